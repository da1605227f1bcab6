"""The mathematics of reward terms: pure functions of scores, samples and log-probabilities."""
