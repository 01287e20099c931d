"""All of a merged checkpoint's folder but its weights: config, code, tokenizer, report, model card."""
