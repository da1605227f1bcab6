"""Methods that train a LoRA, one file each."""
