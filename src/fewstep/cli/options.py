"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

RecipeFile = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe's YAML file, or the name of a shipped one.")
]
RunDirectory = Annotated[
    Path | None, typer.Option("--out", help="The run's directory; runs/<the recipe's name> unless given.")
]
Overrides = Annotated[
    list[str] | None, typer.Option("-s", "--set", metavar="KEY=VALUE", help="Override a field: -s train.steps=100")
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start over: delete what an earlier run left in the directory.")]
