"""`fewstep lora import`: a configuration of ai-toolkit as a recipe."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Annotated

import typer


def import_config(
    file: Annotated[Path, typer.Argument(metavar="CONFIG", help="A configuration of ai-toolkit, YAML or JSON.")],
    out: Annotated[Path, typer.Option(help="The recipe to write.")],
) -> None:
    """Turn a configuration of ai-toolkit into a recipe of fewstep lora train; names what has no equivalent."""
    from fewstep.atomic import write_text
    from fewstep.config.ai_toolkit import import_ai_toolkit
    from fewstep.config.load import dump_recipe, parse_recipe, read_yaml
    from fewstep.errors import UserError
    from fewstep.outputs import check_file

    if os.path.lexists(out):
        raise UserError(f"{out}: already exists; choose another --out")
    check_file(out, ".yaml")
    tree = read_yaml(file, "a configuration")
    try:
        found = import_ai_toolkit(tree)
    except (TypeError, ValueError) as error:
        raise UserError(f"{file}: a value of the wrong type ({error})") from None
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    recipe = parse_recipe(found.recipe, str(file))
    write_text(out, dump_recipe(recipe))
    for remark in found.remarks:
        typer.echo(remark)
    words = ["fewstep", "lora", "prepare", found.folder or "DIR", "--out", found.recipe["data"]["images"]]
    words += ["--size", str(max(found.recipe["data"]["resolutions"]))]
    words += ["--trigger", found.trigger] if found.trigger else []
    typer.echo(f"First make the training set: {shlex.join(words)}")
    typer.echo(out)
