"""`fewstep plan`: what a distillation will need."""

from typing import Annotated

import typer

from fewstep.cli.options import Overrides, RecipeFile


def plan(
    recipe: RecipeFile,
    gpu: Annotated[str | None, typer.Option(help="A size such as 24GB, or a name such as rtx4090 or h100.")] = None,
    overrides: Overrides = None,
) -> None:
    """Say what a recipe's distillation needs before any weight is loaded: memory, forwards, arithmetic, time.

    The figures are estimates for one GPU; activations of the moment and the allocator's losses come on top.
    """
    from rich.console import Console
    from rich.table import Table

    from fewstep.errors import UserError
    from fewstep.planning import GPUS, REACHED, SAVERS, parse_gpu
    from fewstep.planning import plan as make
    from fewstep.recipes.load import load_recipe
    from fewstep.recipes.schema import DistillRecipe

    def recipe_with(*more: str) -> DistillRecipe:
        found = load_recipe(recipe, [*(overrides or []), *more])
        if not isinstance(found, DistillRecipe):
            raise UserError(f"{recipe}: its kind is {found.kind}; plans are made for distill")
        return found

    chosen = parse_gpu(gpu) if gpu else None
    resolved = recipe_with()
    found = make(resolved)
    console = Console(soft_wrap=True)
    console.print(
        f"{resolved.name}: {found.parameters / 1e6:,.4g}e6 parameters, {found.width}x{found.height} px, "
        f"batch {resolved.train.batch_size}, roles: {resolved.roles.kind}"
    )
    table = Table()
    table.add_column("memory")
    table.add_column("GB", justify="right")
    for part, held in found.memory.items():
        table.add_row(part, f"{held / 1e9:.3f}")
    table.add_section()
    table.add_row("in all", f"{found.total / 1e9:.3f}")
    console.print(table)
    passes = f"{found.forwards:g} forwards and {found.backwards:g} backwards in the mean"
    console.print(f"a step: {passes}, {found.flops / 1e12:.3g} TFLOP")
    for name, one in GPUS.items() if chosen is None else [(str(gpu), chosen)]:
        fits = "fits" if found.total < 0.95 * one.bytes else "does not fit"
        seconds = f", {found.flops / (REACHED * one.flops):.2g} s a step" if one.flops else ""
        console.print(f"{name} ({one.bytes / 1e9:.0f} GB): {fits}{seconds}")
    console.print(f"times are guesses, at {REACHED:.0%} of the rates that makers state for bf16")
    if chosen is not None and found.total >= 0.95 * chosen.bytes:
        turned_on: list[str] = []
        for saver in SAVERS:
            less = make(recipe_with(*turned_on, saver))
            if less.total < 0.99 * found.total:
                turned_on.append(saver)
                console.print(f"with -s {' -s '.join(turned_on)}: {less.total / 1e9:.1f} GB")
                found = less
            if found.total < 0.95 * chosen.bytes:
                return
        console.print("that is still too much: make train.batch_size smaller, and train.accumulate larger")
