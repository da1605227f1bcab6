"""`fewstep data`: builds data sets."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Build data sets.", no_args_is_help=True)


@app.callback()
def data() -> None:
    """Build data sets."""


@app.command()
def emoji(
    out: Annotated[Path, typer.Option(help="Folder for the sheets of images and the names.")],
    packages: Annotated[
        Path | None, typer.Option(help="Folder with the npm packages as .tgz; fetched with npm unless given.")
    ] = None,
) -> None:
    """Build the emoji world from the public packages of three emoji sets and of the Unicode CLDR."""
    from fewstep.emoji.build import build

    counts = build(out, packages)
    typer.echo(f"{out}: " + ", ".join(f"{count} {what}" for what, count in counts.items()))


@app.command()
def sheet(
    out: Annotated[Path, typer.Option(help="The image file to write.")] = Path("emoji-world.png"),
) -> None:
    """Draw every core thing in each style, on the eight backgrounds in turn."""
    from fewstep.data.images import grid
    from fewstep.emoji.dataset import COLORS, STYLES, EmojiDataset, EmojiSpec

    world, colors = EmojiDataset.load(), list(COLORS)
    concepts = [
        EmojiSpec(thing.index, style, colors[(thing.index + shift) % len(colors)], "en")
        for shift, style in enumerate(STYLES)
        for thing in world.things
    ]
    grid(world.render(concepts, jitter=False), columns=26).save(out)
    typer.echo(out)
