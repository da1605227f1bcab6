"""`fewstep convert`: between diffusers folders and single files."""

from __future__ import annotations

import os
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fewstep.cli.options import Dtype

if TYPE_CHECKING:
    import torch


class ExportFormat(StrEnum):
    """What `convert` writes."""

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
        typer.Option(help="Dtype of the written weights. [default: the stored one, fp32 if mixed; bf16 if quantized]"),
    ] = None,
) -> None:
    """Convert a single file (original or ComfyUI names, fp8, GGUF) to a diffusers folder, or a folder to a file."""
    from fewstep.errors import UserError
    from fewstep.locks import exclusive
    from fewstep.models.components import NO_FP16
    from fewstep.outputs import check_file, check_folder

    if dtype is Dtype.fp8:
        raise UserError("--dtype fp8: fp8 files can be read but not written; use bf16")
    if dtype is Dtype.fp16:
        raise UserError(NO_FP16)
    if os.path.lexists(out):
        raise UserError(f"{out}: already exists; choose another --out")
    if to is ExportFormat.diffusers:
        if out.suffix in (".safetensors", ".gguf"):
            raise UserError(f"{out}: --to diffusers writes a folder; give its name, or --to original for a file")
        check_folder(out)
    else:
        check_file(out, ".safetensors")
    out.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(out):
        typer.echo(_convert(model, out, to, components_from, dtype.torch_dtype if dtype is not None else None))


def _convert(
    model: str, out: Path, to: ExportFormat, components_from: str | None, weights_dtype: torch.dtype | None
) -> Path:
    from fewstep.errors import UserError
    from fewstep.export.single_file import write_transformer
    from fewstep.models.components import load_component, read_config, resolve_model
    from fewstep.models.family import resolve_family
    from fewstep.models.file_kinds import refuse_other_files
    from fewstep.models.partial_models import with_components_from
    from fewstep.models.pipeline import load
    from fewstep.models.single_file import read_transformer, stored_dtype
    from fewstep.models.step_adapters import check_one_transformer

    single_file = Path(model).is_file() or model.lower().endswith((".safetensors", ".gguf"))
    if not single_file:
        check_one_transformer(resolve_model(model), f"--to {to.value}")
    if components_from is not None and not single_file:
        raise UserError(f"--components-from: no effect on {model}, which is not a single file; leave it out")
    if single_file:
        refuse_other_files(Path(model))
        if components_from is None:
            raise UserError(f"{model}: contains the transformer alone; give --components-from, a model of its family")
        folder = resolve_model(components_from)
        family = resolve_family(folder)
        config = read_config(folder, "transformer")
        transformer = read_transformer(model, family, config, weights_dtype or stored_dtype(model))
        if to is ExportFormat.diffusers:
            _check_weights(folder, [name for name in family.modules if name != "transformer"])
            return with_components_from(transformer, folder).save(out)
    elif to is ExportFormat.diffusers:
        folder = resolve_model(model)
        converted = load(folder, "cpu", weights_dtype)
        _check_weights(folder, resolve_family(folder).modules)
        return converted.save(out)
    else:
        folder = resolve_model(model)
        family = resolve_family(folder)
        transformer = load_component(folder, "transformer", weights_dtype)
        _check_weights(folder, ["transformer"])
    return write_transformer(transformer, out, family, to.value)


def _check_weights(folder: Path, names: Iterable[str]) -> None:
    """Raises: UserError if weights of these components are not finite: such a model makes nothing but noise."""
    from fewstep.models.weight_files import check_finite

    for name in names:
        check_finite(folder / name)
