"""`fewstep prefs`: votes between images, ratings of models, and a reward from the votes."""

from pathlib import Path
from typing import Annotated

import typer

from fewstep.cli.options import Column, Device, Overwrite

app = typer.Typer(help="Human feedback: votes, ratings of models, and a reward from the votes.", no_args_is_help=True)

Votes = Annotated[Path, typer.Argument(metavar="DIR", help="Folder with votes, as fewstep prefs collect writes it.")]
Voter = Annotated[str | None, typer.Option(help="Only this voter's votes, as votes.jsonl names it. [default: all]")]


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
    seed: Annotated[int, typer.Option(help="Image i starts from seed + i, for all models that name no seed.")] = 0,
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


@app.command()
def rank(votes: Votes, voter: Voter = None) -> None:
    """Rate the models by the votes on their images; writes rank.json and rank.png into the folder."""
    from fewstep.data.preferences import read_votes, votes_file
    from fewstep.outputs import check_file
    from fewstep.preferences.ranking import RANK_FILE, RANK_PLOT, plot_writer, print_ranking
    from fewstep.preferences.ranking import rank as rank_models

    file, write_plot = votes_file(votes), plot_writer()
    found = rank_models(read_votes(votes, voter), file)
    for name in (RANK_FILE, RANK_PLOT):
        check_file(file.parent / name)
    found.save(file.parent / RANK_FILE)
    write_plot(found, file.parent / RANK_PLOT)
    print_ranking(found)
    typer.echo(f"{file.parent / RANK_FILE}, {file.parent / RANK_PLOT}")


@app.command()
def train(
    votes: Votes,
    out: Annotated[Path, typer.Option(help="Folder of the head.")],
    features: Annotated[
        str,
        typer.Option(help="open-nsfw (of the image alone), clip:PATH_OR_HUB_ID, or reward:NAME with embeddings."),
    ] = "open-nsfw",
    voter: Voter = None,
    held_out: Annotated[
        float, typer.Option(min=0.05, max=0.5, help="Share of the prompts whose votes measure the head.")
    ] = 0.2,
    overwrite: Overwrite = False,
    device: Device = "auto",
) -> None:
    """Train a reward on votes, a linear head on frozen features; use it as the reward preference:OUT."""
    from fewstep.core.device import resolve_device
    from fewstep.preferences.train import train_head

    found = train_head(
        votes,
        out,
        features=features,
        voter=voter,
        held_out=held_out,
        overwrite=overwrite,
        device=resolve_device(device),
    )
    typer.echo(f"agreement with held-out votes: {found.held_out}")
    typer.echo(f"of always preferring the model that won more training votes: {found.models_alone}")
    typer.echo(f"with the votes that it was trained on: {found.trained}")
    typer.echo(f"{out}: reward preference:{out}")
