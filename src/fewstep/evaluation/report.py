"""The report: one self-contained page, index.html, and one picture, grid.png."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

from torch import Tensor

from fewstep.atomic import atomic_file, write_text
from fewstep.evaluation import plots, table
from fewstep.evaluation.grid import picture, tile
from fewstep.evaluation.metrics_file import Metrics, Samples
from fewstep.evaluation.watch import DIVERSITY, REWARD
from fewstep.pages.render import render_page
from fewstep.training.tracking import read_metrics

_TEMPLATE = Path(__file__).with_name("report.html")
_SHOWN = 48  # prompts in the page's grid: about 1 MB
_SHOWN_SEEDS = 6


def write(folder: str | Path, metrics: Metrics, samples: Samples, curves: Path | None = None) -> Path:
    """Writes index.html and grid.png into `folder`; returns the page's path. `curves`: a run's metrics.jsonl.

    Raises: UserError if the folder cannot be written.
    """
    folder = Path(folder)
    page = render(metrics, samples, read_metrics(curves) if curves is not None and curves.is_file() else [])
    with atomic_file(folder / "grid.png") as aside:
        picture(samples).save(aside, "PNG", optimize=True)
    write_text(folder / "index.html", page)
    return folder / "index.html"


def render(metrics: Metrics, samples: Samples, lines: list[dict[str, Any]]) -> str:
    """The page. `lines`: a run's logged metrics, for the curves."""
    shown = range(min(_SHOWN, len(samples.prompts)))
    seeded = [column for column in samples.columns.values() if len(column.seeds)]
    points = {
        ", ".join(table.label(name, figures)): (figures["nfe"], figures["object_acc"])
        for name, figures in metrics.figures.items()
        if figures.get("object_acc") is not None
    }
    return render_page(
        _TEMPLATE,
        summary=summary(metrics),
        heads=[table.label(name, figures) for name, figures in table.columns(metrics).items()],
        targets=metrics.targets,
        status=table.status,
        rows=table.rows(metrics),
        features=metrics.run.get("feature_network", metrics.features),
        notes=table.notes(metrics),
        columns=[column.title.partition(", ")[::2] for column in samples.columns.values()],
        seeded=[column.title.partition(", ")[::2] for column in seeded],
        grid=[
            (
                samples.prompts[i],
                [(data_uri(column.images[i]), column.predicted_as[i]) for column in samples.columns.values()],
            )
            for i in shown
        ],
        total=len(samples.prompts),
        seeds=[
            (samples.prompts[i], [[data_uri(image) for image in column.seeds[i][:4]] for column in seeded])
            for i in range(min(_SHOWN_SEEDS, len(seeded[0].seeds)))
        ],
        chart=plots.accuracy_by_nfe(points, metrics.real.get("object_acc")) if len(points) > 1 else None,
        watch=plots.relative_curves(lines, REWARD if any(REWARD in line for line in lines) else DIVERSITY),
        curves=plots.curves(lines),
        run={key: _plain(value) for key, value in metrics.run.items() if key not in ("prompt_list", "scores")},
    )


def summary(metrics: Metrics) -> str:
    """The evaluation in a sentence or two."""
    count = metrics.run["prompts"]
    sentence = f"{len(metrics.figures)} settings, the same {count} prompts and seeds"
    student = next((figures for name, figures in metrics.figures.items() if name.startswith("student")), None)
    teacher = next(iter(metrics.figures.values()))
    if student is None or student is teacher or student.get("object_acc") is None:
        return sentence + "."
    return (
        f"{sentence}. At an NFE of {student['nfe']} the student's object accuracy is "
        f"{100 * student['object_acc']:.1f}%; its teacher's, at {teacher['nfe']}, is "
        f"{100 * teacher['object_acc']:.1f}%."
    )


def _plain(value: Any) -> str:
    """A setting of the run as text: lists and mappings without brackets."""
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{key} {each}" for key, each in value.items()) or "none"
    return str(value)


def data_uri(image: Tensor) -> str:
    """uint8 [H,W,3] as a lossless WebP inside a data: URI."""
    buffer = io.BytesIO()
    tile(image).save(buffer, "WEBP", lossless=True, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
