"""Stable Diffusion 3 and 3.5: the multimodal diffusion transformer with three text encoders."""
