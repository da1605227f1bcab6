"""`fewstep distill`: a few-step student from a teacher."""

import os
from typing import Annotated

import typer

from fewstep.cli.options import Device, Overrides, Overwrite, RecipeFile, RunDirectory


def distill(
    recipe: RecipeFile,
    out: RunDirectory = None,
    overrides: Overrides = None,
    overwrite: Overwrite = False,
    device: Device = "auto",
    ray: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Train with N processes of Ray Train. [default: this process]"),
    ] = None,
) -> None:
    """Distill a teacher into a few-step student. The same command again resumes from the last checkpoint."""
    from fewstep import api

    if ray is None:
        made = api.distill(recipe, out, overrides=overrides or [], overwrite=overwrite, device=device)
    else:
        from fewstep.ray_train import distill_on_ray

        made = distill_on_ray(recipe, out, overrides or [], overwrite, device, ray)
    if made.metrics is not None:
        from fewstep.evaluation.table import print_short_summary

        print_short_summary(made.metrics)
    if os.environ.get("RANK", "0") != "0":
        return  # the main process prints the paths
    typer.echo(f"student: {made.student}")
    if made.report is not None:
        typer.echo(f"report:  {made.report}")
