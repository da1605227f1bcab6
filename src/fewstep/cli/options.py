"""Options that several commands share."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import torch

Model = Annotated[str, typer.Argument(metavar="MODEL", help='Folder of a model, or a bundled one\'s name ("micro").')]
RecipeFile = Annotated[str, typer.Argument(metavar="RECIPE", help="YAML file of a recipe, or a bundled one's name.")]
RunDirectory = Annotated[Path | None, typer.Option("--out", help="Run directory. [default: runs/<recipe's name>]")]
Overrides = Annotated[
    list[str] | None, typer.Option("-s", "--set", metavar="KEY=VALUE", help="Override a key: -s train.steps=100")
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Start over: delete an earlier run's files in the directory.")
]
Column = Annotated[str, typer.Option(help="Column or key of the prompts, in all but text files.")]
Device = Annotated[str, typer.Option(help="Device to compute on: auto (a GPU if there is one), cpu, cuda, cuda:1, ...")]


class Dtype(StrEnum):
    """Data types of weights. fp16 is listed so that it is refused with the reason."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp8 = "fp8"
    fp16 = "fp16"

    @property
    def torch_dtype(self) -> torch.dtype:
        import torch

        names = {"fp32": "float32", "bf16": "bfloat16", "fp8": "float8_e4m3fn", "fp16": "float16"}
        dtype: torch.dtype = getattr(torch, names[self.value])
        return dtype


def argument_text(word: str) -> str:
    """An argument's UTF-8 text; in another locale, such as C, Python leaves its bytes escaped as lone surrogates."""
    try:
        return os.fsencode(word).decode("utf-8")
    except UnicodeError:
        return word


def parse_steps(text: str | None) -> int | str | None:
    """A number of sampling steps, "auto", or None. Raises: typer.BadParameter."""
    if text is None or text == "auto":
        return text
    try:
        steps = int(text)
    except ValueError:
        raise typer.BadParameter("Input should be a valid integer, or auto", param_hint="'--steps'") from None
    if steps < 1:
        raise typer.BadParameter("Input should be greater than or equal to 1", param_hint="'--steps'")
    return steps


def was_given(context: typer.Context, name: str) -> bool:
    """Whether an option is on the command line; else its value is the default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
