"""`fewstep convert`: between diffusers folders and single files."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fewstep.cli.options import Dtype


class ExportFormat(StrEnum):
    diffusers = "diffusers"
    original = "original"
    comfyui = "comfyui"


def convert(
    model: Annotated[
        str, typer.Argument(help="A model's folder or name, or a transformer as a .safetensors or .gguf file.")
    ],
    out: Annotated[Path, typer.Option(help="The folder, or the .safetensors file, to write.")],
    to: Annotated[
        ExportFormat, typer.Option(help="A whole folder, or the transformer as one file with these tensor names.")
    ] = ExportFormat.diffusers,
    components_from: Annotated[
        str | None,
        typer.Option(help="For a single file: the model that provides the configuration and the other components."),
    ] = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option(help="Dtype of the written weights. [default: the stored one; bf16 for fp8 and GGUF]"),
    ] = None,
) -> None:
    """Convert a single file (original or ComfyUI names, fp8, GGUF) to a diffusers folder, or a folder to a file."""
    from fewstep.errors import UserError
    from fewstep.export.single_file import write_transformer
    from fewstep.models.components import NO_FP16, load_component, read_config, resolve_model
    from fewstep.models.family import resolve_family
    from fewstep.models.pipeline import load, with_components_from
    from fewstep.models.single_file import read_transformer, stored_dtype

    if out.exists():
        raise UserError(f"{out}: already exists; choose another --out")
    if dtype is Dtype.fp8:
        raise UserError("--dtype fp8: fp8 files can be read but not written; use bf16")
    if dtype is Dtype.fp16:
        raise UserError(NO_FP16)
    if to is not ExportFormat.diffusers and out.suffix != ".safetensors":
        raise UserError(f"{out}: the name of a single file must end with .safetensors")
    weights_dtype = dtype.torch_dtype if dtype is not None else None
    if model.endswith((".safetensors", ".gguf")):
        if components_from is None:
            raise UserError(f"{model}: contains the transformer alone; give --components-from, a model of its family")
        folder = resolve_model(components_from)
        family = resolve_family(folder)
        config = read_config(folder, "transformer")
        transformer = read_transformer(model, family, config, weights_dtype or stored_dtype(model))
        if to is ExportFormat.diffusers:
            typer.echo(with_components_from(transformer, folder).save(out))
            return
    elif to is ExportFormat.diffusers:
        typer.echo(load(model, dtype=weights_dtype).save(out))
        return
    else:
        folder = resolve_model(model)
        family = resolve_family(folder)
        transformer = load_component(folder, "transformer", weights_dtype)
    typer.echo(write_transformer(transformer, out, family, to.value))
