"""`fewstep encode-prompts`: prompt lists, cleaned and encoded."""

from pathlib import Path
from typing import Annotated

import typer

from fewstep.cli.options import Column, Device, Overwrite


def prompts(
    sources: Annotated[
        list[str],
        typer.Argument(help=".txt, .jsonl, .json, .csv, .tsv or .parquet files, folders, or hf:owner/name[:split]."),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the encoded prompts.")],
    model: Annotated[str, typer.Option(help="Folder or name of the model whose text encoder encodes the prompts.")],
    column: Column = "prompt",
    max_tokens: Annotated[
        int, typer.Option(min=1, max=512, help="Longer prompts, with the chat template, are left out.")
    ] = 512,
    shard_size: Annotated[int, typer.Option(min=1, max=1_000_000, help="Prompts in a file.")] = 1000,
    overwrite: Overwrite = False,
    device: Device = "auto",
) -> None:
    """Read prompts, drop duplicates, empty and long ones, and encode the rest for distillation.

    Running the same command again resumes an interrupted one. Use the prompts with -s prompts.source=FOLDER.
    """
    from fewstep.data.prepare_prompts import CleaningStats, check_before_loading, prepare_prompts
    from fewstep.models.partial_models import load_prompt_encoder
    from fewstep.outputs import claimed_folder
    from fewstep.progress import progress_bar

    shown = 0

    def show(stats: CleaningStats) -> None:
        nonlocal shown
        advance(stats.read - shown)
        shown = stats.read

    with claimed_folder(out):
        check_before_loading(sources, column, out, overwrite)
        encoder = load_prompt_encoder(model, device)
        with progress_bar(None, "prompts read") as advance:
            stats = prepare_prompts(
                sources,
                encoder,
                out,
                column=column,
                max_tokens=max_tokens,
                shard_size=shard_size,
                overwrite=overwrite,
                progress=show,
            )
    summary = stats.summary()
    scripts = ", ".join(f"{name} {100 * count / stats.kept:.1f}%" for name, count in summary["languages"].items())
    tokens = ", ".join(f"{name} {count}" for name, count in summary["tokens"].items())
    typer.echo(
        f"{out}: {stats.kept:,} of {stats.read:,} prompts kept; left out: {stats.empty:,} empty, "
        f"{stats.duplicate:,} duplicates, {stats.too_long:,} too long"
    )
    typer.echo(f"languages: {scripts}")
    typer.echo(f"tokens with the template: {tokens}")
