"""`fewstep lora prepare`: a training set of a folder of images."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

SHOWN = 3  # files of a check in the terminal; the page has more


class FitName(StrEnum):
    """How crops are chosen."""

    buckets = "buckets"
    square = "square"
    longest_edge = "longest-edge"


def prepare(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Images, with .txt captions, metadata.csv or .jsonl, or none.")
    ],
    out: Annotated[Path, typer.Option(help="The folder to write, outside of DIR.")],
    size: Annotated[int, typer.Option(min=64, max=4096, help="Pixels of a square crop; of the longest edge.")] = 1024,
    fit: Annotated[
        FitName, typer.Option(help="Crop to the nearest of 11 aspect ratios, to a square, or only to the longest edge.")
    ] = FitName.buckets,
    name: Annotated[str, typer.Option(help="Of the subject, for captions that lack it.")] = "",
    template: Annotated[
        str, typer.Option(help="What is put before captions that lack the name.")
    ] = "a photo of {name}",
    trigger: Annotated[str, typer.Option(help="Word put before captions that lack it.")] = "",
    model: Annotated[str | None, typer.Option(help="The model whose tokenizer counts the captions' tokens.")] = None,
    check_text: Annotated[
        bool,
        typer.Option("--check-text", help="Look for text and watermarks with RapidOCR, which takes seconds an image."),
    ] = False,
    check_people: Annotated[
        bool, typer.Option("--check-people", help="Look for several people and missing close-ups by frontal faces.")
    ] = False,
) -> None:
    """Check, crop and caption a folder of images for the training of a LoRA. The originals are only read."""
    import os

    from fewstep.data.training_set.captions import CaptionRule
    from fewstep.data.training_set.checks import Thresholds
    from fewstep.data.training_set.faces import open_face_finder
    from fewstep.data.training_set.prepare import PrepareSettings
    from fewstep.data.training_set.prepare import prepare as make
    from fewstep.data.training_set.texts import open_text_finder
    from fewstep.errors import UserError
    from fewstep.outputs import check_folder

    if os.path.lexists(out):
        raise UserError(f"{out}: already exists; choose another --out")
    check_folder(out)
    limits = Thresholds()
    settings = PrepareSettings(
        size,
        fit.value,  # type: ignore[arg-type]
        CaptionRule(name.strip(), template, trigger.strip()),
        limits,
        open_text_finder(limits.least_confidence) if check_text else None,
        _token_counter(model) if model is not None else None,
        open_face_finder() if check_people else None,
    )
    checks, count = make(folder, out, settings)
    for check in checks:
        typer.echo(f"{check.level:11}  {check.name}: {check.found or 'fine'} ({check.threshold})")
        for file in check.files[:SHOWN]:
            typer.echo(f"{'':13}{file}")
        if len(check.files) > SHOWN:
            typer.echo(f"{'':13}and {len(check.files) - SHOWN} more")
    typer.echo(f"{out / 'dataset.yaml'}: {count} images; {out / 'report.html'} shows them")


def _token_counter(model: str) -> Callable[[str], int]:
    """Counts the tokens of a prompt with the model's template. Raises: UserError if there is no such model."""
    from fewstep.models.components import load_component, resolve_model

    tokenizer = load_component(resolve_model(model), "tokenizer")
    return lambda caption: len(tokenizer(caption).input_ids)
