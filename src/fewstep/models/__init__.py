"""Models: what a denoiser is, Z-Image, prompt encoding, VAE, loading and saving."""
