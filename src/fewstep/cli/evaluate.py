"""`fewstep evaluate`: a model's figures and report."""

import warnings
from pathlib import Path
from typing import Annotated

import typer

from fewstep.cli.options import Column, Device, Dtype


def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help='A model\'s folder, hub id, or bundled name ("micro").')
    ],
    prompts: Annotated[
        str | None,
        typer.Option(
            help="A prompt source (emoji), a .txt, .jsonl, .json, .csv, ... file, or encoded prompts. [default: the "
            "test prompts of the run that made the model; emoji for bundled models]"
        ),
    ] = None,
    column: Column = "prompt",
    num_prompts: Annotated[int, typer.Option(min=2, help="Number of test prompts.")] = 200,
    max_minutes: Annotated[
        float | None, typer.Option(min=0.01, help="Measure fewer prompts where all take longer. [default: no limit]")
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="The model it was distilled from. [default: as in its fewstep.json]")
    ] = None,
    compare: Annotated[
        list[str] | None,
        typer.Option(metavar="LABEL=MODEL", help="A further model in the report; may be repeated."),
    ] = None,
    scorer: Annotated[
        list[str] | None,
        typer.Option(
            help="A scorer, such as emoji or clip_score:PATH; may be repeated. [default: all without checkpoint]"
        ),
    ] = None,
    scorers: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,...",
            help="Several scorers or rewards, separated by commas: clip:PATH,pickscore:PATH,ocr. Their ranges, "
            "licenses and needs are in docs/guides/rewards.md.",
        ),
    ] = None,
    features: Annotated[
        str, typer.Option(help="Feature network: open-nsfw, or clip, dinov2 or inception with :PATH_OR_HUB_ID.")
    ] = "open-nsfw",
    out: Annotated[Path | None, typer.Option(help="Folder of the report. [default: runs/evaluate-<model>]")] = None,
    seed: Annotated[int, typer.Option(help="Image i starts from seed + i.")] = 0,
    device: Device = "auto",
    dtype: Annotated[Dtype | None, typer.Option(help="Dtype of the weights. [default: as stored]")] = None,
) -> None:
    """Measure a model on fixed prompts and seeds; writes metrics.json and index.html. The same command continues an
    interrupted one."""
    from fewstep import api
    from fewstep.evaluation.feature_networks import open_features
    from fewstep.evaluation.prompts import read_test_prompts
    from fewstep.evaluation.runner import check_report_folder, report_writer
    from fewstep.evaluation.settings import parse_compared
    from fewstep.evaluation.table import print_summary
    from fewstep.inference.params import parse_params
    from fewstep.outputs import claimed_folder
    from fewstep.rewards.scorers import open_scorers

    folder = out or Path("runs") / f"evaluate-{Path(model).name}"
    # Mistakes are reported before the model is loaded.
    parse_params({"seed": seed})
    check_report_folder(folder)
    report_writer()
    texts = read_test_prompts(prompts, num_prompts, column, model=model)
    chosen = [*(scorer or []), *(each.strip() for each in (scorers or "").split(",") if each.strip())] or None
    open_scorers(chosen)
    open_features(features)
    chosen_teacher = api.find_teacher(model, teacher)
    others = parse_compared(compare or [])
    with claimed_folder(folder):
        if (folder / "metrics.json").exists():
            warnings.warn(f"{folder}: the report in it will be replaced", stacklevel=1)
        try:
            measured = api.evaluate(
                api.load(model, device, dtype.torch_dtype if dtype else None),
                texts,
                teacher=chosen_teacher,
                compare=others,
                scorers=chosen,
                features=features,
                max_minutes=max_minutes,
                out=folder,
                seed=seed,
            )
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"interrupted; finished sets of images are kept in {folder}, and the same command continues"
            ) from None
    print_summary(measured)
    typer.echo(folder / "index.html")
