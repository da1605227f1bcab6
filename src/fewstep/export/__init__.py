"""Export to formats of other programs."""
