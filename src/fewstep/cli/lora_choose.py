"""`fewstep lora choose`: the best checkpoint and strength of a LoRA training, by measurement."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fewstep.cli.options import Device


def choose(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory of fewstep lora train.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="Model that the images are drawn with, such as the few-step model for a LoRA of its base. "
            "[default: the one trained]"
        ),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            help="Unseen prompts: a source or a file. [default: emoji for bundled models, else built-in ones]"
        ),
    ] = None,
    count: Annotated[int, typer.Option(min=2, max=64, help="Prompts of the set, and as many unseen ones.")] = 32,
    scorer: Annotated[
        list[str] | None,
        typer.Option(
            help="A scorer of prompt adherence; may be repeated. [default: all without checkpoint that apply]"
        ),
    ] = None,
    features: Annotated[
        str, typer.Option(help="Feature network: open-nsfw, or clip, dinov2 or inception with :PATH_OR_HUB_ID.")
    ] = "open-nsfw",
    out: Annotated[Path | None, typer.Option(help="Folder of the report. [default: RUN/choice]")] = None,
    seed: Annotated[int, typer.Option(help="Image i starts from seed + i.")] = 0,
    device: Device = "auto",
) -> None:
    """Compare the saved checkpoints of a LoRA training on fixed prompts, recommend one and its strength; writes a
    report. The same command continues an interrupted one."""
    from fewstep.core.device import resolve_device
    from fewstep.evaluation.lora_choice.runner import PAGE, ChoiceSettings, choose_checkpoint
    from fewstep.outputs import claimed_folder

    folder = out or run / "choice"
    settings = ChoiceSettings(model, prompts, count, scorer or None, features, seed)
    with claimed_folder(folder):
        result = choose_checkpoint(run, folder, settings, resolve_device(device))
    for reason in (*result.checkpoints.choice.reasons, *result.strengths.choice.reasons):
        typer.echo(reason)
    typer.echo(f"{result.file}:{result.strength:g}")
    typer.echo(folder / PAGE)
