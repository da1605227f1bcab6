"""Training methods, one file or folder each."""
