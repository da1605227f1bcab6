"""`fewstep export`: whole models for other programs, and transformers compiled ahead of time."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fewstep.cli.options import Device, Dtype, Model

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
    out: Annotated[Path, typer.Option(help="The folder to write; with --aot the .pt2 file.")],
    to: Annotated[
        Program | None,
        typer.Option(
            help="ComfyUI; GGUF for ComfyUI with the nodes ComfyUI-GGUF; or stable-diffusion.cpp, which takes GGUF."
        ),
    ] = None,
    quantize: Annotated[
        Quantize | None,
        typer.Option(help="Of the blocks' matrices: fp8 for ComfyUI, q8_0 or q4_k for GGUF. [default: bf16]"),
    ] = None,
    aot: Annotated[
        bool, typer.Option("--aot", help="Compile the transformer ahead of time, for generate --aot on this machine.")
    ] = False,
    size: Annotated[
        int | None, typer.Option(min=1, help="With --aot: pixels of a side. [default: the model's]")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="With --aot: samples of one call; a guided image takes two. [default: 1]")
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="With --aot: fp32 or bf16. [default: as stored]")] = None,
    device: Device = "auto",
) -> None:
    """Export a whole model for ComfyUI or stable-diffusion.cpp, or compile its transformer ahead of time."""
    from fewstep.errors import UserError
    from fewstep.locks import exclusive

    if aot == (to is not None):
        raise UserError("export: give one of --to and --aot")
    if os.path.lexists(out):
        raise UserError(f"{out}: already exists; choose another --out")
    if to is None:
        if quantize is not None:
            raise UserError("--quantize: no effect with --aot; leave it out")
        _compile(model, out, size, batch or 1, dtype, device)
        return
    given = {"--size": size, "--batch": batch, "--dtype": dtype, "--device": None if device == "auto" else device}
    for name, value in given.items():
        if value is not None:
            raise UserError(f"{name}: no effect without --aot; leave it out")
    from fewstep.export.whole_model import check_export, export_model
    from fewstep.outputs import check_folder

    chosen: Format | None = None if quantize is None else quantize.value
    check_export(model, to.value, chosen)
    check_folder(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(out):
        _show(export_model(model, to.value, out, chosen))


def _compile(model: str, out: Path, size: int | None, batch: int, dtype: Dtype | None, device: str) -> None:
    from rich.console import Console

    from fewstep.errors import UserError
    from fewstep.export.aot import export_package
    from fewstep.models.components import resolve_model
    from fewstep.models.pipeline import load
    from fewstep.models.step_adapters import check_one_transformer
    from fewstep.outputs import check_file

    if dtype is Dtype.fp8:
        raise UserError("--dtype fp8: cannot be compiled ahead of time; use bf16")
    check_file(out, ".pt2")
    check_one_transformer(resolve_model(model), "--aot")
    pipeline = load(model, device, dtype.torch_dtype if dtype is not None else None)
    with Console(stderr=True).status("compiling the transformer ..."):
        export_package(pipeline, out, size or pipeline.generation_config.height, batch)
    typer.echo(out)


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
