"""Four tiny experts of one tiny base model, made from scratch in minutes on a CPU."""
