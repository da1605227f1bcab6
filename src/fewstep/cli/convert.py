"""`fewstep convert`: between diffusers' folders and single files."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fewstep.cli.options import Dtype


class To(StrEnum):
    diffusers = "diffusers"
    original = "original"
    comfyui = "comfyui"


def convert(
    model: Annotated[str, typer.Argument(help="A model's folder or name, or a transformer as .safetensors or .gguf.")],
    out: Annotated[Path, typer.Option(help="The folder, or the .safetensors file, to write.")],
    to: Annotated[
        To, typer.Option(help="A whole folder, or the transformer in one file with these names.")
    ] = To.diffusers,
    base: Annotated[
        str | None, typer.Option(help="For a single file: the model that has its other parts, and its numbers.")
    ] = None,
    precision: Annotated[
        Dtype | None, typer.Option(help="Of what is written. [default: the weights' own; bf16 for 8 bits and GGUF]")
    ] = None,
) -> None:
    """Turn a single file (the original names, ComfyUI's, 8 bits, GGUF) into a folder, or a folder into one."""
    from fewstep.errors import UserError
    from fewstep.models.components import NO_FP16, load_component, read_config, resolve_model
    from fewstep.models.pipeline import load, with_components_from
    from fewstep.models.zimage.single_file import read_transformer, stored_dtype, write_transformer

    if out.exists():
        raise UserError(f"{out}: is there already; choose another --out")
    if precision is Dtype.fp8:
        raise UserError("--precision fp8: such files are read, not written; take bf16")
    if precision is Dtype.fp16:
        raise UserError(NO_FP16)
    if to is not To.diffusers and out.suffix != ".safetensors":
        raise UserError(f"{out}: a single file's name ends with .safetensors")
    single, dtype = model.endswith((".safetensors", ".gguf")), precision.torch_dtype if precision is not None else None
    if single and base is None:
        raise UserError(f"{model}: a single file has the transformer alone; say --base, a model of the same kind")
    if single:
        config = read_config(resolve_model(str(base)), "transformer")
        transformer = read_transformer(model, config, dtype or stored_dtype(model))
    if to is To.diffusers:
        typer.echo((with_components_from(transformer, str(base)) if single else load(model, dtype=dtype)).save(out))
    else:
        transformer = transformer if single else load_component(resolve_model(model), "transformer", dtype)
        typer.echo(write_transformer(transformer, out, "comfyui" if to is To.comfyui else "original"))
