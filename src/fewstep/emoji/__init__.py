"""The emoji dataset and the micro model family: a plug-in of recipe kinds, prompts, images, scorers and commands."""

from fewstep.emoji import recipes as _recipes  # noqa: F401  # registers the recipe kinds
