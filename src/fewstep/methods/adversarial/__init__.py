"""A discriminator of noisy latents, and how far its judgment can be trusted."""
