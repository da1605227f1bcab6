"""Models: families, denoisers, prompt encoding, autoencoders, adapters, loading and saving."""
