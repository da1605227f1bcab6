"""`fewstep prompts`: other people's prompt lists, cleaned and encoded."""

from pathlib import Path
from typing import Annotated

import typer

from fewstep.cli.options import Overwrite


def prompts(
    sources: Annotated[
        list[str], typer.Argument(help=".txt, .jsonl, .csv or .parquet files, or hf:owner/name[:split].")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the encoded prompts.")],
    model: Annotated[str, typer.Option(help="Folder or name of the teacher whose text encoder is to be asked.")],
    column: Annotated[str, typer.Option(help="Where the prompts are, in all but text files.")] = "prompt",
    max_tokens: Annotated[
        int, typer.Option(min=1, max=512, help="Longer prompts, with the chat template, are left out.")
    ] = 512,
    shard_size: Annotated[int, typer.Option(min=1, help="Prompts in a file.")] = 1000,
    overwrite: Overwrite = False,
) -> None:
    """Read prompts, drop duplicates and what is empty or too long, and encode the rest for distillation.

    The same command again goes on where an interrupted one stopped. Use them with -s prompts.source=FOLDER.
    """
    import torch

    from fewstep.data.prepare_prompts import prepare
    from fewstep.models.pipeline import load_prompt_encoder
    from fewstep.progress import counter

    encoder = load_prompt_encoder(model, "cuda" if torch.cuda.is_available() else "cpu")
    with counter("prompts read") as show:
        report = prepare(
            sources,
            encoder,
            out,
            column=column,
            max_tokens=max_tokens,
            shard_size=shard_size,
            fresh=overwrite,
            progress=lambda found: show(found.read),
        )
    summary = report.summary()
    languages = ", ".join(f"{name} {100 * count / report.kept:.1f}%" for name, count in summary["languages"].items())
    tokens = ", ".join(f"{name} {count}" for name, count in summary["tokens"].items())
    typer.echo(
        f"{out}: {report.kept:,} of {report.read:,} prompts kept; left out: {report.empty:,} empty, "
        f"{report.duplicate:,} duplicates, {report.too_long:,} too long"
    )
    typer.echo(f"languages: {languages}")
    typer.echo(f"tokens with the template: {tokens}")
