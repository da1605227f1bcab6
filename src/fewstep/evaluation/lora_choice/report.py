"""The report of a comparison of checkpoints: one self-contained page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from fewstep.atomic import write_text
from fewstep.evaluation import plots
from fewstep.evaluation.images import as_float, as_uint8
from fewstep.evaluation.lora_choice.rule import (
    MAX_OVERBAKE,
    MIN_FLEXIBILITY,
    MIN_MEMORIZATION,
    MIN_SHARPNESS,
    Figures,
    Reference,
)
from fewstep.evaluation.report import data_uri
from fewstep.pages.render import render_page

if TYPE_CHECKING:
    from fewstep.evaluation.lora_choice.runner import Comparison, Part

_TEMPLATE = Path(__file__).with_name("report.html")
_SHOWN = 6  # prompts of each kind in the page's grids
_SIDE = 128  # pixels of an image in them


def write(file: Path, result: Comparison) -> None:
    """Write the page. Raises: UserError if it cannot be written."""
    write_text(file, render(result))


def render(result: Comparison) -> str:
    """The page."""
    reference, count = result.reference, len(result.prompts)
    shown = [*range(min(_SHOWN, result.known)), *range(result.known, min(count, result.known + _SHOWN))]
    return render_page(
        _TEMPLATE,
        name=result.run.recipe.name,
        file=result.file,
        strength=f"{result.strength:g}",
        limits=(MIN_FLEXIBILITY, MIN_MEMORIZATION, MAX_OVERBAKE, MIN_SHARPNESS),
        parts=[
            _part("Checkpoints", "step", result.checkpoints, result, shown),
            _part(f"Strengths of {result.checkpoints.choice.best}", "strength", result.strengths, result, shown),
        ],
        rows=[_row("without the LoRA", reference.without, reference), _row("training images", reference.real, None)],
        settings=result.settings,
    )


def _part(title: str, axis: str, part: Part, result: Comparison, shown: Sequence[int]) -> dict[str, object]:
    points = {float(name.split()[-1]): figures for name, figures in part.figures.items()}
    columns = {"without": result.without, **part.drawn}
    return {
        "title": title,
        "choice": part.choice,
        "rows": [(_row(name, figures, result.reference), name) for name, figures in part.figures.items()],
        "curves": curves(axis, points, result.reference) if len(points) > 1 else None,
        "columns": list(columns),
        "grid": [
            (result.prompts[index], index < result.known, [_small(one.images[index]) for one in columns.values()])
            for index in shown
        ],
    }


def _row(name: str, figures: Figures, reference: Reference | None) -> list[str]:
    shared = [f"{figures.flexibility:.2f}", f"{figures.memorization:.2f}"]
    pixels = [f"{figures.saturation:.3f}", f"{1000 * figures.hf_energy:.3f}"]
    if reference is None:
        return [name, "–", f"{figures.likeness:.3f}", "–", "–", *pixels, "–"]
    score, overbake = f"{reference.score(figures):.2f}", f"{reference.overbake(figures):.2f}"
    return [name, score, f"{figures.likeness:.3f}", *shared, *pixels, overbake]


def _small(image: Tensor) -> str:
    """uint8 [H, W, 3] as a data: URI, scaled down to ``_SIDE``."""
    height, width = image.shape[:2]
    scale = _SIDE / max(height, width)
    if scale >= 1:
        return data_uri(image)
    size = max(1, round(height * scale)), max(1, round(width * scale))
    return data_uri(as_uint8(F.interpolate(as_float(image[None]), size, mode="bilinear", antialias=True))[0])


def curves(axis: str, points: dict[float, Figures], reference: Reference) -> str:
    """The figures against steps or strengths; dashed: without the LoRA; dotted: training images, or a limit."""
    without, real = reference.without, reference.real
    panels: list[tuple[str, list[float], float | None, float | None]] = [
        ("likeness", [one.likeness for one in points.values()], without.likeness, real.likeness),
        ("flexibility", [one.flexibility for one in points.values()], 1.0, MIN_FLEXIBILITY),
        ("memorization", [one.memorization for one in points.values()], without.memorization, MIN_MEMORIZATION),
        ("saturation", [one.saturation for one in points.values()], without.saturation, real.saturation),
        ("hf energy", [one.hf_energy for one in points.values()], without.hf_energy, real.hf_energy),
        ("score", [reference.score(one) for one in points.values()], None, None),
    ]
    with matplotlib.rc_context(plots.STYLE):
        figure = Figure(figsize=(10.5, 4.2), layout="constrained")
        for index, (title, values, dashed, dotted) in enumerate(panels):
            axes = figure.add_subplot(2, 3, index + 1)
            for level, style in ((dashed, (0, (5, 2))), (dotted, (0, (1, 1.5)))):
                if level is not None:
                    axes.axhline(level, color=plots.INK, linewidth=0.8, linestyle=style)
            axes.plot(list(points), values, "o-", color=plots.ACCENT, markersize=3)
            axes.set_title(title)
            axes.set_xlabel(axis)
            axes.locator_params(nbins=4)
        return plots.svg(figure)
