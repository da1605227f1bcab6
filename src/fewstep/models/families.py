"""The model families that ship: each registers itself."""
