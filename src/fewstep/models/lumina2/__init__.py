"""Lumina-Image-2.0: the 2.6B unified diffusion transformer with a Gemma-2 text encoder."""
