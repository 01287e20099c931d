"""One more expert in a merged checkpoint, or one exchanged, the others bit for bit as they were."""
