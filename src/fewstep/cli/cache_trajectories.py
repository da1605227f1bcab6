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
    """Sample a teacher's trajectories and keep them on disk. The same command again resumes; under torchrun every
    process samples its share."""
    from fewstep.config.load import load_recipe, wrong_kind
    from fewstep.config.recipe import CacheRecipe
    from fewstep.data.teacher_trajectories import make_cache
    from fewstep.training.distributed import init_distributed

    resolved = load_recipe(recipe, overrides or [])
    if not isinstance(resolved, CacheRecipe):
        raise wrong_kind(resolved, recipe)
    folder = out or Path("runs") / resolved.name
    with init_distributed(device) as dist:
        make_cache(
            resolved, folder, overwrite=overwrite, device=dist.device, process=dist.process, barrier=dist.barrier
        )
    if dist.is_main_process:
        typer.echo(folder)
