"""Own and merged vocabularies, the union's tokenizer, prompts."""
