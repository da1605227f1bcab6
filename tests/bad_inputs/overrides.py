"""Recipes that are run with overrides."""

from bad_inputs.files import CACHE, DISTILL, PROMPTS
from bad_inputs.table import Case

FILES = {"mine.yaml": DISTILL, "cache.yaml": CACHE, "prompts.txt": PROMPTS}


def with_override(override: str, expected: str) -> Case:
    return Case(f"distill mine.yaml -s '{override}'", expected, FILES)


def with_overrides(expected: str, *overrides: str) -> Case:
    return Case("distill mine.yaml " + " ".join(f"-s '{each}'" for each in overrides), expected, FILES)


def caching_with(override: str, expected: str) -> Case:
    return Case(f"cache-trajectories cache.yaml -s '{override}'", expected, FILES)
