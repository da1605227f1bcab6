"""`fewstep plan`: what a distillation will need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from fewstep.cli.options import Overrides, RecipeFile

if TYPE_CHECKING:
    from rich.console import Console

    from fewstep.config.recipe import DistillRecipe
    from fewstep.plan.estimate import GPUSpec, Plan


def plan(
    recipe: RecipeFile,
    gpu: Annotated[str | None, typer.Option(help="A size such as 24GB, or a name such as rtx4090 or h100.")] = None,
    gpus: Annotated[int, typer.Option(min=1, help="How many share the weights (torchrun).")] = 1,
    overrides: Overrides = None,
) -> None:
    """Say what a recipe's distillation needs before any weight is loaded: memory, forwards, arithmetic, time.

    The figures are estimates for each GPU; what its allocator loses comes on top.
    """
    from rich.console import Console

    from fewstep.plan.estimate import parse_gpu
    from fewstep.plan.estimate import plan as make

    chosen = parse_gpu(gpu) if gpu else None
    console, waiting = Console(soft_wrap=True), Console(stderr=True)
    for prefix, phase in _distillations(recipe, overrides or []):
        with waiting.status(f"{phase.name}: counting what is alive in a step ..."):
            found = make(phase, gpus)
        _say(console, phase, found, gpus)
        _compare(console, found, str(gpu), chosen)
        if chosen is not None and not found.fits(chosen):
            _advise(console, phase, found, chosen, gpus, prefix)
    console.print("times are guesses, at 40% of the rates that makers state for bf16")


def _distillations(recipe: str, overrides: Sequence[str]) -> list[tuple[str, DistillRecipe]]:
    """A recipe's distillations, itself or its phases, with what comes before their keys. Raises: UserError."""
    from fewstep.config.load import load_recipe
    from fewstep.config.recipe import DistillRecipe, StagesRecipe
    from fewstep.errors import UserError
    from fewstep.stages import stage_recipe

    found = load_recipe(recipe, list(overrides))
    if isinstance(found, StagesRecipe):
        return [(f"stages.{number}.", stage_recipe(found, phase)) for number, phase in enumerate(found.stages)]
    if not isinstance(found, DistillRecipe):
        raise UserError(f"{recipe}: its kind is {found.kind}; plans are made for distillations")
    return [("", found)]


def _say(console: Console, recipe: DistillRecipe, found: Plan, gpus: int) -> None:
    from rich.table import Table

    console.print(
        f"{recipe.name}: {found.parameters / 1e6:,.4g}e6 parameters, {found.width}x{found.height} px, "
        f"batch {recipe.train.batch_size}, roles: {recipe.roles.kind}" + (f", {gpus} GPUs" if gpus > 1 else "")
    )
    table = Table()
    table.add_column("memory" if gpus == 1 else "memory of each GPU")
    table.add_column("GB", justify="right")
    for title, parts in found.moments.items():
        for part, held in parts.items():
            table.add_row(part, f"{held / 1e9:.3f}")
        table.add_row(title, f"{sum(parts.values()) / 1e9:.3f}", end_section=True)
    console.print(table)
    passes = f"{found.forwards:g} forwards and {found.backwards:g} backwards in the mean"
    console.print(
        f"a step: {passes} for each of {recipe.train.gradient_accumulation_steps} batches, "
        f"{found.flops / 1e12:.3g} TFLOP"
    )


def _compare(console: Console, found: Plan, name: str, chosen: GPUSpec | None) -> None:
    from fewstep.plan.estimate import ASSUMED_MFU, GPUS

    for label, one in GPUS.items() if chosen is None else [(name, chosen)]:
        fits = "fits" if found.fits(one) else "does not fit"
        seconds = f", {found.flops / (ASSUMED_MFU * one.flops):.2g} s a step" if one.flops else ""
        console.print(f"{label} ({one.bytes / 1e9:.0f} GB): {fits}{seconds}")


def _advise(console: Console, recipe: DistillRecipe, found: Plan, chosen: GPUSpec, gpus: int, prefix: str) -> None:
    """What to turn on, one after the other, until it fits."""
    from rich.console import Console

    from fewstep.config.load import with_overrides
    from fewstep.config.recipe import DistillRecipe
    from fewstep.plan.estimate import MEMORY_OPTIONS
    from fewstep.plan.estimate import plan as make

    turned_on: list[str] = []
    for saver in MEMORY_OPTIONS:
        other = with_overrides(recipe, [*turned_on, saver])
        assert isinstance(other, DistillRecipe)
        with Console(stderr=True).status(f"trying {saver} ..."):
            less = make(other, gpus)
        if less.total < 0.99 * found.total:
            turned_on.append(saver)
            console.print(f"with {' '.join(f'-s {prefix}{one}' for one in turned_on)}: {less.total / 1e9:.1f} GB")
            found = less
        if found.fits(chosen):
            return
    console.print("that is still too much: make train.batch_size smaller, and train.gradient_accumulation_steps larger")
