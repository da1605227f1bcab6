"""`fewstep prefs`: votes between images, ratings of models, and a reward from the votes."""

from pathlib import Path
from typing import Annotated

import typer

from fewstep.cli.options import Column, Device

app = typer.Typer(help="Human feedback: votes, ratings of models, and a reward from the votes.", no_args_is_help=True)



@app.command()
def collect(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="Two or more, as [LABEL=]MODEL[@KEY=VALUE,...], such as few=micro@steps=4,guidance_scale=0.",
        ),
    ],
    prompts: Annotated[str, typer.Option(help="A .txt (one a line), .jsonl, .json, .csv, ... file, or a folder.")],
    out: Annotated[Path, typer.Option(help="Folder of the images and votes.")],
    column: Column = "prompt",
    steps: Annotated[int | None, typer.Option(min=1, help="Sampling steps. [default: each model's]")] = None,
    seed: Annotated[int, typer.Option(help="Image i starts from seed + i, for all models.")] = 0,
    count: Annotated[
        int | None, typer.Option(min=1, help="Pairs to vote on. [default: every two models on every prompt]")
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of the page; 0 is any free one.")] = 8765,
    voter: Annotated[
        str, typer.Option(help="human, human:NAME, or a reward or scorer that votes, as NAME[:ARGUMENT].")
    ] = "human",
    device: Device = "auto",
) -> None:
    """Generate images of several models and collect votes on pairs of them, on a local page or by a reward.

    The same command again continues.
    """
    from fewstep.data.prompt_files import read_prompts
    from fewstep.preferences.collect import collect_votes
    from fewstep.preferences.contenders import parse_contenders

    contenders = parse_contenders(models, seed, steps)
    texts = read_prompts(prompts, column)
    collect_votes(contenders, texts, out, seed=seed, count=count, port=port, voter=voter, device=device)
