"""`fewstep evaluate`: a model's figures and report."""

from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A model's folder, or a shipped one's name (\"micro\").")
    ],
    prompts: Annotated[
        str, typer.Option(help='"emoji" for held-out prompts of the emoji world, or a text file, one a line.')
    ] = "emoji",
    count: Annotated[int, typer.Option(min=2, help="How many of the emoji world's prompts.")] = 200,
    teacher: Annotated[str | None, typer.Option(help="The model it was made from. [default: as its card says]")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the report. [default: runs/evaluate-<model>]")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Image i starts from seed + i.")] = 0,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, ...")] = "cpu",
) -> None:
    """Measure a model on fixed prompts and seeds; writes metrics.json and index.html."""
    from fewstep import api
    from fewstep.data.prompts import read_prompts
    from fewstep.evaluation.runner import emoji_prompts
    from fewstep.evaluation.table import print_summary

    texts = emoji_prompts(count) if prompts == "emoji" else read_prompts(prompts)
    folder = out or Path("runs") / f"evaluate-{Path(model).name}"
    measured = api.evaluate(
        api.load(model, device),
        texts,
        teacher=api.load(teacher, device) if teacher else None,
        out=folder,
        seed=seed,
    )
    print_summary(measured)
    typer.echo(folder / "index.html")
