"""Wan 2.1: the 1.3B and 14B diffusion transformers for videos and images, with a UMT5 text encoder."""
