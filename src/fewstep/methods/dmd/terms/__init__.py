"""The loss terms, one class each."""
