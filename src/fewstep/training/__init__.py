"""Training: the loop and what surrounds it. Knows no algorithm."""
