"""Options and arguments of the commands of `fewstep lora`."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import torch

    from fewstep.models.lora.targets import LoraTargets

WeightedFile = Annotated[
    str, typer.Argument(metavar="FILE[:STRENGTH]", help="A LoRA file, or a folder of peft or diffusers.")
]
WeightedFiles = Annotated[
    list[str], typer.Argument(metavar="FILE[:STRENGTH]...", help="LoRA files, or folders of peft or diffusers.")
]
Ignore = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY", help="Leave out a key of the file, or all that match, as in 'text_encoder.*'."),
]
ModelOfNames = Annotated[
    str | None,
    typer.Option(help="The model, for the names and sizes of its layers. [default: names of the released Z-Image]"),
]
Energy = Annotated[
    float, typer.Option(min=0, max=1, help="Take the least rank that keeps this fraction of the squared norm.")
]


class LoraFormatName(StrEnum):
    """Formats of LoRA files that are written."""

    diffusers = "diffusers"
    peft = "peft"
    comfyui = "comfyui"
    kohya = "kohya"
    ai_toolkit = "ai-toolkit"


class LoraDtypeName(StrEnum):
    """Data types of the weights in LoRA files."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"

    @property
    def torch_dtype(self) -> torch.dtype:
        import torch

        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.value]


LoraDtype = Annotated[
    LoraDtypeName | None, typer.Option("--dtype", help="Data type of the written weights. [default: the file's]")
]


def check_lora_out(out: Path, to: LoraFormatName = LoraFormatName.diffusers) -> None:
    """Check an output before the work. Raises: UserError if it exists or cannot be written."""
    from fewstep.errors import UserError
    from fewstep.outputs import check_file, check_folder

    if os.path.lexists(out):
        raise UserError(f"{out}: already exists; choose another --out")
    if to is not LoraFormatName.peft:
        check_file(out, ".safetensors")
    elif out.suffix == ".safetensors":
        raise UserError(f"{out}: --to peft writes a folder; give its name")
    else:
        check_folder(out)


def open_targets(model: str | None) -> LoraTargets:
    """The layers of a model; without one, the names of those of the released Z-Image. Raises: UserError."""
    from fewstep.models.components import resolve_model
    from fewstep.models.family import get_family
    from fewstep.models.lora.targets import model_targets, released_targets

    return model_targets(resolve_model(model)) if model else released_targets(get_family("ZImagePipeline"))
