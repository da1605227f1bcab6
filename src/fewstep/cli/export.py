"""`fewstep export`: whole models for other programs."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fewstep.cli.options import Model

if TYPE_CHECKING:
    from fewstep.export.whole_model import Export
    from fewstep.export.whole_model import Quantize as Format


class Program(StrEnum):
    """Where the files are used."""

    comfyui = "comfyui"
    gguf = "gguf"
    sd_cpp = "sd.cpp"


class Quantize(StrEnum):
    """Formats of matrices."""

    fp8 = "fp8"
    q8_0 = "q8_0"
    q4_k = "q4_k"


def export(
    model: Model,
    to: Annotated[
        Program,
        typer.Option(
            help="ComfyUI; GGUF for ComfyUI with the nodes ComfyUI-GGUF; or stable-diffusion.cpp, which takes GGUF."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    quantize: Annotated[
        Quantize | None,
        typer.Option(help="Of the blocks' matrices: fp8 for ComfyUI, q8_0 or q4_k for GGUF. [default: bf16]"),
    ] = None,
) -> None:
    """Export transformer, text encoder and VAE, with ComfyUI's workflow or stable-diffusion.cpp's command."""
    from fewstep.errors import UserError
    from fewstep.export.whole_model import check_export, export_model
    from fewstep.locks import exclusive
    from fewstep.outputs import check_folder

    if os.path.lexists(out):
        raise UserError(f"{out}: already exists; choose another --out")
    chosen: Format | None = None if quantize is None else quantize.value
    check_export(model, to.value, chosen)
    check_folder(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(out):
        _show(export_model(model, to.value, out, chosen))


def _show(export: Export) -> None:
    """The files, with the errors of quantization."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for title in ("file", "MB", "formats", "relative RMS error", "largest"):
        table.add_column(title, justify="left" if title in ("file", "formats", "largest") else "right")
    for each in export.components:
        formats = ", ".join(f"{len(group)} {name}" for name, group in each.formats.items())
        worst = f"{each.worst.relative_rms:.2%} {each.worst.name}" if each.relative_rms else "-"
        table.add_row(each.file, f"{each.bytes / 1e6:.1f}", formats, f"{each.relative_rms:.2%}", worst)
    console = Console()
    console.print(table)
    console.print("errors are against bf16; export.json has those of all tensors", highlight=False)
    if export.command is not None:
        typer.echo(f"{export.command} -p PROMPT")
    typer.echo(export.folder)
