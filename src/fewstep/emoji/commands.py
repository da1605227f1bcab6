"""`fewstep emoji`: builds the emoji dataset, trains its models, and publishes the micro models."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="The emoji dataset and the models trained on it.", no_args_is_help=True)

#: Recipe kind -> module whose ``train(recipe, run)`` trains it and returns the folder it wrote.
TRAINERS = {
    "vae": "fewstep.emoji.train_vae",
    "decoder": "fewstep.emoji.train_decoder",
    "text_encoder": "fewstep.emoji.train_text_encoder",
    "flow_matching": "fewstep.emoji.train_flow_matching",
    "classifier": "fewstep.emoji.train_classifier",
    "reward": "fewstep.emoji.train_reward",
}


@app.command()
def build(
    out: Annotated[Path, typer.Option(help="Folder for the image sheets and the names.")],
    packages: Annotated[
        Path | None, typer.Option(help="Folder with the npm packages as .tgz; downloaded with npm unless given.")
    ] = None,
) -> None:
    """Build the dataset's files from the public packages of three emoji sets and of the Unicode CLDR."""
    from fewstep.emoji.build import build

    counts = build(out, packages)
    typer.echo(f"{out}: " + ", ".join(f"{count} {unit}" for unit, count in counts.items()))


@app.command()
def sheet(
    out: Annotated[Path, typer.Option(help="The image file to write.")] = Path("emoji.png"),
) -> None:
    """Draw every core object in each style, on the eight backgrounds in turn."""
    from fewstep.data.images import grid
    from fewstep.emoji.dataset import BACKGROUNDS, STYLES, EmojiDataset, EmojiSpec
    from fewstep.outputs import check_image, write_image

    check_image(out)
    dataset, backgrounds = EmojiDataset.load(), list(BACKGROUNDS)
    specs = [
        EmojiSpec(item.index, style, backgrounds[(item.index + shift) % len(backgrounds)], "en")
        for shift, style in enumerate(STYLES)
        for item in dataset.objects
    ]
    write_image(grid(dataset.render(specs, jitter=False), columns=26), out)
    typer.echo(out)


@app.command()
def gallery(
    out: Annotated[Path, typer.Option(help="The safetensors file to write.")],
) -> None:
    """Compute the features of real emoji that the scorer nearest_real compares images with."""
    from fewstep.emoji.dataset import EmojiDataset
    from fewstep.emoji.nearest_real import write_gallery
    from fewstep.evaluation.feature_networks import open_features
    from fewstep.outputs import check_file

    check_file(out, ".safetensors")
    write_gallery(out, EmojiDataset.load(), open_features())
    typer.echo(out)


@app.command()
def train(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A recipe's YAML file, or the name of a bundled recipe.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Directory of the run; runs/<the recipe's name> unless given.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("-s", "--set", metavar="KEY=VALUE", help="Override a field: -s train.steps=100")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete the files of an earlier run in the directory and start over.")
    ] = False,
) -> None:
    """Train an autoencoder, decoder, text encoder, teacher, classifier or reward. The same command resumes the run."""
    import importlib

    from fewstep.config.load import load_recipe, wrong_kind
    from fewstep.models.fingerprint import recipe_fingerprints
    from fewstep.training.precision import resolve_precision
    from fewstep.training.run_dir import RunDir

    resolved = load_recipe(recipe, overrides or [])
    if resolved.kind not in TRAINERS:
        raise wrong_kind(resolved, recipe)
    trainer = importlib.import_module(TRAINERS[resolved.kind])
    directory = out or Path("runs") / resolved.name
    resolved = resolve_precision(resolved, directory, overwrite=overwrite)
    known = recipe_fingerprints(resolved)
    with RunDir(directory, resolved, overwrite=overwrite, fingerprints=known) as run:
        typer.echo(trainer.train(resolved, run))


@app.command()
def publish(
    runs: Annotated[list[Path], typer.Argument(help="Directories of the teacher's training stages, in order.")],
    out: Annotated[Path, typer.Option(help="Folder for the published model.")],
    model: Annotated[
        Path | None,
        typer.Option(help="Folder of the model; that of the last stage unless a decoder was trained since."),
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts per row of the model card's tables.")] = 200,
) -> None:
    """Pack a teacher: fp16 weights, the best guidance scale, and a model card with its quality and sample images."""
    from fewstep.emoji.publish import publish

    typer.echo(publish(runs, out, prompts, model))


@app.command("publish-student")
def publish_student(
    run: Annotated[Path, typer.Argument(help="Directory of a finished run of fewstep distill, with its report.")],
    out: Annotated[Path, typer.Option(help="Folder for the published model, beside its teacher's.")],
) -> None:
    """Pack a distilled student: fp16 weights, links to its teacher's components, and a model card."""
    from fewstep.emoji.publish_student import publish_student

    typer.echo(publish_student(run, out))
