"""FLUX.2 [klein]: double and single stream blocks with a Qwen3 text encoder."""
