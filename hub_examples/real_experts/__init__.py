"""Four fine-tunes of a real base model (135M parameters), made in under an hour on two CPU cores; none is stored."""
