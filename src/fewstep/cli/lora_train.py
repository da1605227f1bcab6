"""`fewstep lora train` and `fewstep lora adapter`: a LoRA from a training set, or from a student's own images."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fewstep.cli.options import Device, Model, Overrides, Overwrite, RecipeFile, RunDirectory

if TYPE_CHECKING:
    from fewstep.config.lora_recipe import LoraRecipe


def train(
    recipe: RecipeFile,
    out: RunDirectory = None,
    overrides: Overrides = None,
    overwrite: Overwrite = False,
    device: Device = "auto",
) -> None:
    """Train a LoRA on images with captions. The same command again resumes from the last checkpoint."""
    resolved = _load(recipe, overrides or [])
    typer.echo(_train(resolved, out or Path("runs") / resolved.name, overwrite, device))


def adapter(
    model: Model,
    out: Annotated[Path, typer.Option(help="The .safetensors file to write.")],
    prompts: Annotated[str, typer.Option(help="Source of the prompts, as prompts.source of a recipe.")],
    run: Annotated[Path | None, typer.Option(help="Run directory. [default: runs/<the file's name>]")] = None,
    overrides: Overrides = None,
    overwrite: Overwrite = False,
    device: Device = "auto",
) -> None:
    """Make a training adapter of a few-step model: a LoRA trained on the model's own images, by the recipe
    training-adapter. The same command again resumes."""
    from shutil import copyfile

    from fewstep.atomic import atomic_file
    from fewstep.cli.lora_options import check_lora_out

    check_lora_out(out)
    named = [f"name={out.stem}", f"model={model}", f"data.own_images.prompts={prompts}"]
    resolved = _load("training-adapter", [*named, *(overrides or [])])
    made = _train(resolved, run or Path("runs") / resolved.name, overwrite, device)
    with atomic_file(out) as aside:
        copyfile(made, aside)
    typer.echo(out)


def _load(recipe: str, overrides: list[str]) -> LoraRecipe:
    """Raises: UserError."""
    from fewstep.config.load import load_recipe, wrong_kind
    from fewstep.config.lora_recipe import LoraRecipe

    found = load_recipe(recipe, overrides)
    if not isinstance(found, LoraRecipe):
        raise wrong_kind(found, recipe)
    return found


def _train(recipe: LoraRecipe, directory: Path, overwrite: bool, device: str) -> Path:
    """The LoRA file of a run. Raises: UserError."""
    from fewstep.core.device import resolve_device
    from fewstep.errors import UserError
    from fewstep.lora_job import train_lora
    from fewstep.models.fingerprint import recipe_fingerprints
    from fewstep.training.distributed import DistContext
    from fewstep.training.precision import resolve_precision
    from fewstep.training.run_dir import RunDir

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("fewstep lora: a LoRA is trained by one process; start it without torchrun")
    chosen = resolve_device(device)
    recipe = resolve_precision(recipe, directory, DistContext(device=chosen), overwrite=overwrite)
    known = recipe_fingerprints(recipe)
    with RunDir(directory, recipe, overwrite=overwrite, fingerprints=known) as run:
        return train_lora(recipe, run, chosen)
