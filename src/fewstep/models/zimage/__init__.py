"""Z-Image: the 6B single-stream diffusion transformer, and small models of the same classes."""
