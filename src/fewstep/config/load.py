"""Recipes from YAML files, with overrides from the command line; every mistake is one line."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from fewstep.config.explain import explain
from fewstep.config.overrides import set_override
from fewstep.config.recipe import Recipe
from fewstep.config.renamed_keys import RENAMED_KINDS
from fewstep.core.registry import load_plugins, recipe_folders, recipe_kinds
from fewstep.errors import UserError

BUNDLED_RECIPES = Path(__file__).parent / "recipes"

#: The command that runs a recipe, by its kind; those of other kinds are the emoji plug-in's.
COMMANDS = {"distill": "distill", "stages": "distill", "cache_trajectories": "cache-trajectories", "lora": "lora train"}


def wrong_kind(recipe: Recipe, name: str | Path) -> UserError:
    """The error of a command that does not run recipes of this kind; it names the one that does."""
    command = COMMANDS.get(recipe.kind, "emoji train")
    return UserError(f"{name}: its kind is {recipe.kind}; use: fewstep {command} {name}")


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The checked recipe at `path`, with `overrides` like "train.steps=100" (values are YAML) put in first.

    A path that is no file falls back to the shipped recipe of that name: "recipes/micro-turbo.yaml" and "micro-turbo"
    both find the one inside the package.

    Raises: UserError for a missing file, broken YAML, an unknown key (naming the nearest known one) or a bad value.
    """
    file = find_recipe(path)
    tree = read_yaml(file)
    for override in overrides:
        set_override(tree, override, _model_of(tree))
    return parse_recipe(tree, str(path))


def find_recipe(path: str | Path) -> Path:
    """The file that `path` names, or the shipped recipe of that name. Raises: UserError if there is neither."""
    if not str(path).strip():
        raise UserError("the name of the recipe is empty; give a YAML file, or the name of a bundled recipe")
    path = Path(path)
    if path.is_file():
        return path
    if path.is_dir():
        own = path / "recipe.yaml"
        raise UserError(f"{path}: a folder, not a recipe" + (f"; the recipe of this run is {own}" * own.is_file()))
    load_plugins()
    folders = [BUNDLED_RECIPES, *(recipe_folders.get(name) for name in recipe_folders.names())]
    shipped = {file.name: file for folder in folders for file in sorted(folder.glob("[!.]*.yaml"))}
    for name in (path.name, path.name + ".yaml"):
        if name in shipped:
            return shipped[name]
    names = [file.stem for file in shipped.values()]
    if near := difflib.get_close_matches(path.stem, names, n=1, cutoff=0.8):
        raise UserError(f"{path}: no such recipe file; did you mean {near[0]}?")
    raise UserError(f"{path}: no such recipe file (shipped recipes: {', '.join(names) or 'none'})")


def read_yaml(file: Path, content: str = "a recipe") -> dict[str, Any]:
    """The mapping in a YAML file. Raises: UserError if it cannot be read, is not YAML or not a mapping.

    content: what the file holds, for messages.
    """
    try:
        text = file.read_text(encoding="utf-8")
        _refuse_repeated_keys(yaml.compose(text, yaml.SafeLoader))
        tree = yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{file}: not a UTF-8 text file") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: 2024-13-45, a number of 5000 digits
        raise UserError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{file}: {content} is a mapping of keys to values")
    return tree


def _refuse_repeated_keys(root: yaml.Node | None) -> None:
    """YAML takes the last of a key's values; the first would go unnoticed. Raises: yaml.YAMLError."""
    waiting, met = [root], set[int]()
    while waiting:
        node = waiting.pop()
        if id(node) in met:  # an alias, which may even lie within what it stands for
            continue
        met.add(id(node))
        if isinstance(node, yaml.MappingNode):
            keys = set()
            for key, value in node.value:
                if isinstance(key, yaml.ScalarNode) and key.value in keys:
                    problem = f"the key {key.value} is given twice"
                    raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
                if isinstance(key, yaml.ScalarNode):
                    keys.add(key.value)
                waiting.append(value)
        elif isinstance(node, yaml.SequenceNode):
            waiting.extend(node.value)


def parse_recipe(tree: dict[str, Any], source: str) -> Recipe:
    """The recipe in a nested dictionary; `source` names it in errors. Raises: UserError in one line."""
    load_plugins()
    kind = tree.get("kind")
    if not isinstance(kind, str) or kind not in recipe_kinds:
        given = f"kind is {kind!r}" if "kind" in tree else "it has no kind"
        if isinstance(kind, str) and kind in RENAMED_KINDS:
            raise UserError(f"{source}: {given}, which is now {RENAMED_KINDS[kind]}")
        raise UserError(f"{source}: {given}; a recipe's kind is one of {', '.join(sorted(recipe_kinds.names()))}")
    model = recipe_model(kind)
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{source}: {explain(error, tree, model)}") from None


@cache
def recipe_model(kind: str) -> type[Recipe]:
    """The pydantic model of a recipe kind, with all registered methods in it."""
    model: type[Recipe] = recipe_kinds.get(kind).validation_model()
    return model


def with_overrides(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """The recipe with some fields changed, as ``"train.steps=100"``. Raises: UserError in one line."""
    tree = recipe.model_dump(mode="json")
    for override in overrides:
        set_override(tree, override, _model_of(tree))
    return parse_recipe(tree, recipe.name)


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML with every field resolved; `load_recipe` reads it back unchanged."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _model_of(tree: dict[str, Any]) -> type[Recipe] | None:
    """The pydantic model of a recipe that is not checked yet, if its kind is known."""
    load_plugins()
    kind = tree.get("kind")
    return recipe_model(kind) if isinstance(kind, str) and kind in recipe_kinds else None
