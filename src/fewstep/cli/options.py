"""Options that several commands share."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import torch

RecipeFile = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe's YAML file, or the name of a shipped one.")
]
RunDirectory = Annotated[
    Path | None, typer.Option("--out", help="The run's directory; runs/<the recipe's name> unless given.")
]
Overrides = Annotated[
    list[str] | None, typer.Option("-s", "--set", metavar="KEY=VALUE", help="Override a field: -s train.steps=100")
]


class Precision(StrEnum):
    """Of weights; fp16 is there to be refused with its reason."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp8 = "fp8"
    fp16 = "fp16"

    @property
    def dtype(self) -> torch.dtype:
        import torch

        names = {"fp32": "float32", "bf16": "bfloat16", "fp8": "float8_e4m3fn", "fp16": "float16"}
        dtype: torch.dtype = getattr(torch, names[self.value])
        return dtype


Fresh = Annotated[bool, typer.Option("--fresh", help="Start over: delete what an earlier run left in the directory.")]
