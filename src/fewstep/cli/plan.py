"""`fewstep plan`: memory and time of a training before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from fewstep.cli.options import Overrides, RecipeFile

if TYPE_CHECKING:
    from rich.console import Console

    from fewstep.config.lora_recipe import LoraRecipe
    from fewstep.config.recipe import DistillRecipe
    from fewstep.plan.estimate import Plan
    from fewstep.plan.gpus import GPUSpec


def plan(
    recipe: RecipeFile,
    gpu: Annotated[str | None, typer.Option(help="Size such as 24GB, or name such as rtx4090 or h100.")] = None,
    gpus: Annotated[int, typer.Option(min=1, help="Number of GPUs that share the weights (torchrun).")] = 1,
    overrides: Overrides = None,
) -> None:
    """Print the memory, the passes and the time of a distillation or a LoRA's training, before any weight is loaded.

    The figures are estimates for each GPU; fragmentation by the allocator is left out.
    """
    from rich.console import Console

    from fewstep.plan.gpus import ASSUMED_MFU, parse_gpu

    chosen = parse_gpu(gpu) if gpu else None
    console, status = Console(soft_wrap=True), Console(stderr=True)
    for prefix, stage in _trainings(recipe, overrides or []):
        with status.status(f"{stage.name}: dry run of a step ..."):
            found = _plan(stage, gpus)
        print_plan(console, stage, found, gpus)
        print_fit(console, found, str(gpu), chosen)
        if chosen is not None and not found.fits(chosen):
            suggest_savings(console, stage, found, chosen, gpus, prefix)
    console.print(f"the times assume {100 * ASSUMED_MFU:.0f}% MFU (model FLOPs utilization) in bf16")


def _trainings(recipe: str, overrides: Sequence[str]) -> list[tuple[str, DistillRecipe | LoraRecipe]]:
    """A recipe's trainings, itself or its stages, each with the prefix of its keys. Raises: UserError."""
    from fewstep.config.load import load_recipe
    from fewstep.config.lora_recipe import LoraRecipe
    from fewstep.config.recipe import DistillRecipe, StagesRecipe
    from fewstep.errors import UserError
    from fewstep.stages import stage_recipe

    found = load_recipe(recipe, list(overrides))
    if isinstance(found, StagesRecipe):
        stages = [(f"stages.{number}.", stage_recipe(found, stage)) for number, stage in enumerate(found.stages)]
        stages[-1][1].evaluate.enabled = found.evaluate.enabled  # the last student is evaluated
        return [*stages]
    if not isinstance(found, DistillRecipe | LoraRecipe):
        raise UserError(
            f"{recipe}: its kind is {found.kind}; fewstep plan takes recipes of kind distill, stages or lora"
        )
    return [("", found)]


def _plan(recipe: DistillRecipe | LoraRecipe, gpus: int) -> Plan:
    """Raises: UserError."""
    from fewstep.config.recipe import DistillRecipe
    from fewstep.errors import UserError
    from fewstep.plan.estimate import plan as plan_distillation
    from fewstep.plan.lora import plan_lora

    if isinstance(recipe, DistillRecipe):
        return plan_distillation(recipe, gpus)
    if gpus > 1:
        raise UserError(f"--gpus {gpus}: a LoRA is trained by one process, on one GPU")
    return plan_lora(recipe)


def print_plan(console: Console, recipe: DistillRecipe | LoraRecipe, found: Plan, gpus: int) -> None:
    """The memory of every peak by component, and the arithmetic of a step."""
    from rich.table import Table

    from fewstep.config.recipe import DistillRecipe

    trained = (
        recipe.models.train if isinstance(recipe, DistillRecipe) else f"{recipe.method.name} {recipe.adapter.kind}"
    )
    console.print(
        f"{recipe.name}: {found.parameters / 1e6:,.4g}e6 parameters, {found.width}x{found.height} px"
        f"{f', {found.frames} frames' if found.frames > 1 else ''}, "
        f"batch size {recipe.train.batch_size}, {trained} training" + (f", {gpus} GPUs" if gpus > 1 else "")
    )
    table = Table()
    table.add_column("memory" if gpus == 1 else "memory of each GPU")
    table.add_column("GB", justify="right")
    for title, rows in found.peaks.items():
        for name, size in rows.items():
            table.add_row(name, f"{size / 1e9:.3f}")
        table.add_row(title, f"{sum(rows.values()) / 1e9:.3f}", end_section=True)
    console.print(table)
    console.print(
        f"a step: on average {found.forwards:g} forward and {found.backwards:g} backward passes for each of "
        f"{recipe.train.gradient_accumulation_steps} batches, {found.flops / 1e12:.3g} TFLOP"
    )


def print_fit(console: Console, found: Plan, name: str, chosen: GPUSpec | None) -> None:
    """Whether the plan fits the chosen GPU, or each known one, and the time of a step there."""
    from fewstep.plan.gpus import ASSUMED_MFU, GPUS

    for label, gpu in GPUS.items() if chosen is None else [(name, chosen)]:
        fits = "fits" if found.fits(gpu) else "does not fit"
        seconds = f", {found.flops / (ASSUMED_MFU * gpu.flops):.2g} s a step" if gpu.flops else ""
        console.print(f"{label} ({gpu.bytes / 1e9:.0f} GB): {fits}{seconds}")


def suggest_savings(
    console: Console, recipe: DistillRecipe | LoraRecipe, found: Plan, chosen: GPUSpec, gpus: int, prefix: str
) -> None:
    """Adds settings that save memory, one after another, until the plan fits."""
    from rich.console import Console

    from fewstep.config.load import with_overrides
    from fewstep.config.recipe import DistillRecipe
    from fewstep.errors import UserError
    from fewstep.plan.estimate import MEMORY_OPTIONS
    from fewstep.plan.lora import LORA_MEMORY_OPTIONS

    options = MEMORY_OPTIONS if isinstance(recipe, DistillRecipe) else LORA_MEMORY_OPTIONS
    applied: list[str] = []
    optimizers = [f"optim.{part}.optimizer=adamw8bit" for part in recipe.optim]
    for option in [*options, *optimizers]:
        changed = with_overrides(recipe, [*applied, option])
        assert isinstance(changed, type(recipe))
        try:
            with Console(stderr=True).status(f"trying {option} ..."):
                less = _plan(changed, gpus)
        except UserError:  # not with several GPUs
            continue
        if less.total < 0.99 * found.total:
            applied.append(option)
            console.print(f"with {' '.join(f'-s {prefix}{one}' for one in applied)}: {less.total / 1e9:.1f} GB")
            found = less
        if found.fits(chosen):
            return
    console.print("still too large: reduce train.batch_size and raise train.gradient_accumulation_steps")
