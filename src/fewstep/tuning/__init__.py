"""Hyperparameter search: trials of a recipe with other values, compared on its validation prompts."""
