"""`fewstep train`: the parts of a small model, from data."""

from pathlib import Path

import typer

from fewstep.cli.options import Overrides, Overwrite, RecipeFile, RunDirectory


def train(
    recipe: RecipeFile, out: RunDirectory = None, overrides: Overrides = None, overwrite: Overwrite = False
) -> None:
    """Train a model from data, as a recipe says. The same command again goes on from the last checkpoint."""
    from fewstep.config.load import load_recipe
    from fewstep.emoji import recipes as schema
    from fewstep.errors import UserError
    from fewstep.training.run_dir import RunDir

    resolved = load_recipe(recipe, overrides or [])
    if not isinstance(resolved, schema.EmojiRecipe):
        command = {"cache_trajectories": "cache-trajectories"}.get(resolved.kind, "distill")
        raise UserError(f"{recipe}: its kind is {resolved.kind}; use: fewstep {command} {recipe}")
    with RunDir(out or Path("runs") / resolved.name, resolved, fresh=overwrite) as run:
        if isinstance(resolved, schema.VaeRecipe):
            from fewstep.emoji import train_vae as vae

            made = vae.train(resolved, run)
        elif isinstance(resolved, schema.TextEncoderRecipe):
            from fewstep.emoji import train_text_encoder as text

            made = text.train(resolved, run)
        elif isinstance(resolved, schema.FlowMatchingRecipe):
            from fewstep.emoji import train_teacher as teacher

            made = teacher.train(resolved, run)
        else:
            from fewstep.emoji import train_classifier as train_judge

            train_judge.train(resolved, run)
            made = run.directory / "model"
    typer.echo(made)
