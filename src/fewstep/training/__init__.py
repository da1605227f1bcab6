"""Training: the loop, optimizers, checkpoints and distribution; independent of models and algorithms."""
