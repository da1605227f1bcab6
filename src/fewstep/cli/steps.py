"""`fewstep steps`: how many steps a prompt needs."""

from __future__ import annotations

from typing import Annotated

import typer

from fewstep.cli.options import Column, Device, Overwrite

app = typer.Typer(help="As many steps as a prompt needs: for generate --steps auto.", no_args_is_help=True)


@app.callback()
def group() -> None:
    """As many steps as a prompt needs: for generate --steps auto."""


@app.command()
def train(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder of a model for several numbers of steps.")],
    prompts: Annotated[
        str, typer.Option(help="A source (emoji), or a .txt (one a line), .jsonl, .csv, ... file, or a folder.")
    ],
    reward: Annotated[str, typer.Option(metavar="NAME[:ARGUMENT]", help="What scores the images.")],
    column: Column = "prompt",
    counts: Annotated[str, typer.Option(metavar="N,N,...", help="Numbers of steps, ascending.")] = "1,2,4,8",
    mean_steps: Annotated[
        float | None, typer.Option(help="Mean steps of a prompt; unset saves as many as cost no quality.")
    ] = None,
    num_prompts: Annotated[int, typer.Option(min=40, help="Random prompts; a quarter of them is held out.")] = 400,
    seeds: Annotated[int, typer.Option(min=2, max=64, help="Images of each prompt and number of steps.")] = 2,
    seed: Annotated[int, typer.Option(min=0, help="Of the choice of prompts.")] = 0,
    overwrite: Overwrite = False,
    device: Device = "auto",
) -> None:
    """Learn from scored images how many steps a prompt needs; writes steps.safetensors into the model's folder."""
    import torch

    from fewstep.config.sections import PromptSettings
    from fewstep.core.seeds import generator
    from fewstep.data.prompts import open_prompts
    from fewstep.errors import UserError
    from fewstep.evaluation.step_training import (
        check_budget,
        check_counts,
        print_study,
        score_counts,
        train_chooser,
    )
    from fewstep.inference.step_chooser import STEP_CHOOSER
    from fewstep.models.components import BUNDLED_MODELS, resolve_model
    from fewstep.models.pipeline import load
    from fewstep.outputs import check_file
    from fewstep.rewards.open import open_reward
    from fewstep.rewards.scorers import RewardScorer

    wanted, folder = check_counts(counts), resolve_model(model)
    check_budget(mean_steps, wanted)
    if model in BUNDLED_MODELS:
        raise UserError(f"{model}: a bundled model; copy its folder ({folder}) and give the copy")
    if (folder / STEP_CHOOSER).exists() and not overwrite:
        raise UserError(f"{folder / STEP_CHOOSER}: exists; give --overwrite to make it again")
    check_file(folder / STEP_CHOOSER)
    texts = open_prompts(PromptSettings(source=prompts, column=column)).texts("train")
    if len(texts) < num_prompts:
        raise UserError(f"--num-prompts: {prompts} has {len(texts)} prompts, fewer than {num_prompts}")
    order = torch.randperm(len(texts), generator=generator("step prompts", seed))[:num_prompts].tolist()
    chosen = [texts[index] for index in order]
    pipeline = load(model, device)
    scorer = RewardScorer(open_reward(reward, pipeline.device), pipeline.device)
    scores = score_counts(pipeline, chosen, wanted, seeds, scorer)
    chooser, study = train_chooser(pipeline, chosen, scores, wanted, mean_steps)
    print_study(study, reward)
    typer.echo(chooser.save(folder))
