"""What a checkpoint says: configs, architecture, tensor names, LoRA adapters, the merged form."""
