"""`fewstep cache-trajectories`: a teacher's trajectories, kept on disk."""

from pathlib import Path

import typer

from fewstep.cli.options import Device, Overrides, Overwrite, RecipeFile, RunDirectory


def cache(
    recipe: RecipeFile,
    out: RunDirectory = None,
    overrides: Overrides = None,
    overwrite: Overwrite = False,
    device: Device = "auto",
) -> None:
    """Sample a teacher's trajectories and keep them on disk. Running the same command again resumes."""
    from fewstep.config.load import load_recipe, wrong_kind
    from fewstep.config.recipe import CacheRecipe
    from fewstep.data.teacher_trajectories import make_cache

    resolved = load_recipe(recipe, overrides or [])
    if not isinstance(resolved, CacheRecipe):
        raise wrong_kind(resolved, recipe)
    typer.echo(make_cache(resolved, out or Path("runs") / resolved.name, overwrite=overwrite, device=device))
