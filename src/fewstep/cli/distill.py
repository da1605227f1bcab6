"""`fewstep distill`: a few-step student from a teacher."""

import os

import typer

from fewstep.cli.options import Device, Overrides, Overwrite, RecipeFile, RunDirectory


def distill(
    recipe: RecipeFile,
    out: RunDirectory = None,
    overrides: Overrides = None,
    overwrite: Overwrite = False,
    device: Device = "auto",
) -> None:
    """Distill a teacher into a few-step student. The same command again resumes from the last checkpoint."""
    from fewstep import api

    made = api.distill(recipe, out, overrides=overrides or [], overwrite=overwrite, device=device)
    if made.metrics is not None:
        from fewstep.evaluation.table import print_short_summary

        print_short_summary(made.metrics)
    if os.environ.get("RANK", "0") != "0":
        return  # the main process prints the paths
    typer.echo(f"student: {made.student}")
    if made.report is not None:
        typer.echo(f"report:  {made.report}")
