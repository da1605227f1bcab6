"""Prompts, images and teacher trajectories, and the batches made of them."""
