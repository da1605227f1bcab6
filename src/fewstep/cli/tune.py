"""`fewstep tune`: hyperparameter search for a recipe."""

from pathlib import Path
from typing import Annotated

import typer

from fewstep.cli.options import Device, Overrides, Overwrite, RecipeFile


def tune(
    recipe: RecipeFile,
    space: Annotated[Path, typer.Option(help="YAML file: recipe keys with the values to try.")],
    minutes: Annotated[float, typer.Option(min=0.01, max=10**6, help="Minutes of the search, over all sessions.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the search. [default: runs/<recipe's name>-tune]")] = None,
    trials: Annotated[int | None, typer.Option(min=1, help="At most so many trials.")] = None,
    trial_minutes: Annotated[
        float | None,
        typer.Option(min=0.001, help="Minutes of training of a whole trial. [default: a fifth of --minutes]"),
    ] = None,
    trial_steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of a whole trial, in place of its minutes.")
    ] = None,
    rungs: Annotated[
        int, typer.Option(min=1, max=8, help="How often a trial is measured; 1 stops no trial early.")
    ] = 3,
    metric: Annotated[
        str | None, typer.Option(help="Validation metric, such as object_acc or fd_teacher. [default: the space's]")
    ] = None,
    direction: Annotated[
        str | None, typer.Option(help="max or min. [default: the space's, or the metric's own]")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, max=256, help="Processes that run trials at the same time.")] = 1,
    seed: Annotated[int, typer.Option(min=0, max=2**31, help="Seed of the drawn values.")] = 0,
    overrides: Overrides = None,
    overwrite: Overwrite = False,
    device: Device = "auto",
) -> None:
    """Search for the values of a recipe's keys that are best on its validation prompts. The same command continues."""
    from fewstep.tuning.results import print_table
    from fewstep.tuning.tune import tune as run

    found = run(
        recipe,
        space,
        minutes=minutes,
        out=out,
        trials=trials,
        trial_minutes=trial_minutes,
        trial_steps=trial_steps,
        rungs=rungs,
        metric=metric,
        direction=direction,
        jobs=jobs,
        seed=seed,
        overrides=overrides or [],
        overwrite=overwrite,
        device=device,
    )
    print_table(found.search, found.rows)
    typer.echo(f"trials: {found.folder / 'trials.csv'}")
    if found.report is not None:
        typer.echo(f"report: {found.report}")
        typer.echo(f"best:   {found.recipe}, for: fewstep distill {found.recipe}")
