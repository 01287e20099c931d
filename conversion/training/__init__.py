"""What every training shares: its command line, and the Trainer's checkpoints in a staged folder."""
