"""Inference: images from prompts."""
