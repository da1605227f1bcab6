"""The emoji dataset and the micro model family."""
