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
    from fewstep.data.emoji_build import build

    counts = build(out, packages)
    typer.echo(f"{out}: " + ", ".join(f"{count} {what}" for what, count in counts.items()))
