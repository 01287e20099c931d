"""An OpenAI-compatible server of a merged checkpoint, on the serving code of Transformers (extra `serve`)."""
