"""Data: the emoji world, prompts, pictures."""
