"""Inference: from prompts and sampling parameters to images."""
