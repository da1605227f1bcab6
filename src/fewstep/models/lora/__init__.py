"""LoRA files of other programs: read, bound to a transformer's layers, merged into its weights, and written."""
