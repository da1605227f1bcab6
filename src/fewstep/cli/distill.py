"""`fewstep distill`: a few-step student from a teacher."""

import os

import typer

from fewstep.cli.options import Fresh, Overrides, RecipeFile, RunDirectory


def distill(recipe: RecipeFile, out: RunDirectory = None, overrides: Overrides = None, fresh: Fresh = False) -> None:
    """Make a few-step student of a teacher. The same command again goes on from the last checkpoint."""
    from fewstep import api

    made = api.distill(recipe, out, overrides=overrides or [], fresh=fresh)
    if made.metrics is not None:
        from fewstep.evaluation.table import print_summary

        print_summary(made.metrics)
    if os.environ.get("RANK", "0") != "0":
        return  # one of several processes has said it
    typer.echo(f"student: {made.student}")
    if made.report is not None:
        typer.echo(f"report:  {made.report}")
