"""Scorers: images and their prompts to numbers, for training and for evaluation."""
