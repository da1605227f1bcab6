"""The figures of an evaluation in words and columns: shared by the terminal's summary and the report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fewstep.evaluation.metrics_file import Figures, Metrics, Target, interval

Kind = Literal["percent", "number", "thousandths", "count", "milliseconds"]


@dataclass(frozen=True)
class Row:
    """A figure's key ("name_top1", or "en.name_top1" of one language), its name and how it is written."""

    key: str
    label: str
    kind: Kind
    hint: str = ""


ROWS = (
    Row("name_top1", "name right", "percent", "the judge's first choice among all names"),
    Row("en.name_top1", "  English prompts", "percent"),
    Row("zh.name_top1", "  Chinese prompts", "percent"),
    Row("style_top1", "style right", "percent"),
    Row("color_top1", "background right", "percent"),
    Row("fd_teacher", "FD to the teacher", "number", "Fréchet distance to the many-step teacher's images"),
    Row("fd_real", "FD to real", "number", "Fréchet distance to real images; biased upwards, compare arms only"),
    Row("mmd_real", "MMD to real", "number", "unbiased; 0 for sets of one distribution"),
    Row("diversity", "diversity, ×1000", "thousandths", "mean cosine distance between seeds of one prompt"),
    Row("saturation", "saturation", "number", "mean chroma, 0 to 1"),
    Row("contrast", "contrast", "number", "standard deviation of luma within an image"),
    Row("hf_energy", "hf energy, ×1000", "thousandths", "mean square of luma less its 3×3 blur"),
    Row("forwards", "forwards an image", "count", "passes through the denoiser; guidance doubles them"),
    Row("seconds_per_image", "time an image", "milliseconds"),
)

#: The same on the judge's own embedding: a network trained for these images, by this project.
JUDGE_ROWS = (
    Row("fd_teacher_judge", "FD to the teacher", "number"),
    Row("fd_real_judge", "FD to real", "number"),
    Row("mmd_real_judge", "MMD to real", "number"),
    Row("diversity_judge", "diversity, ×1000", "thousandths"),
)


def cell(figures: Figures, row: Row) -> str:
    """One figure as text; an en dash where there is none."""
    language, _, key = row.key.rpartition(".")
    value = figures.get("by_language", {}).get(language, {}).get(key) if language else figures.get(key)
    if value is None:
        return "–"
    if row.kind == "percent":
        return f"{100 * value:.1f}%"
    if row.kind == "milliseconds":
        return f"{1000 * value:.0f} ms"
    if row.kind == "count":
        return f"{value:d}"
    return format_number(1000 * value if row.kind == "thousandths" else value)


def format_number(value: float) -> str:
    """At most three significant digits and three decimals, never an exponent."""
    if abs(value) >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.{3 if abs(value) < 0.9995 else 2 if abs(value) < 9.995 else 1}f}"


def label(name: str, figures: Figures) -> tuple[str, str]:
    """An arm's column head: who, and how."""
    if "steps" not in figures:
        return "real", "images"
    guidance = f"guidance {figures['guidance_scale']:g}" if figures["guidance_scale"] else "no guidance"
    return name.split("_")[0], f"{figures['steps']} {'step' if figures['steps'] == 1 else 'steps'}, {guidance}"


def columns(metrics: Metrics) -> dict[str, Figures]:
    """The arms, then the real images if there are any."""
    return metrics.arms | ({"real": metrics.real} if metrics.real else {})


def rows(metrics: Metrics, of: tuple[Row, ...] = ROWS) -> list[tuple[Row, list[str]]]:
    """The rows in which any column has a figure, with their cells."""
    table = [(row, [cell(figures, row) for figures in columns(metrics).values()]) for row in of]
    return [(row, cells) for row, cells in table if set(cells) != {"–"}]


def notes(metrics: Metrics) -> list[str]:
    """What a reader must know to weigh the figures: the judge's own accuracy, and chance."""
    said = []
    if metrics.judge and metrics.settings.get("prompts_judged"):
        own = metrics.judge
        said.append(
            f"The judge itself, on {own['images']:,.0f} real held-out images: name {100 * own['name_top1']:.1f}%, "
            f"style {100 * own['style_top1']:.1f}%, background {100 * own['color_top1']:.1f}%."
        )
        count = metrics.settings["prompts_judged"]
        share = next(iter(metrics.arms.values()))["name_top1"]
        said.append(f"{count} prompts fix a name accuracy to about ±{100 * interval(share, count):.1f} points (95%).")
    return said


def status(claim: Target) -> str:
    return {True: "holds", False: "falls short", None: "not measured"}[claim.holds]


def print_summary(metrics: Metrics, console: Console | None = None) -> None:
    """The table of arms, the claims with their numbers, and the judge's own accuracy. Fits 80 columns."""
    console = console or Console()
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("", no_wrap=True)
    for name, figures in columns(metrics).items():
        who, how = label(name, figures)
        style = "bold cyan" if who == "student" else ""
        table.add_column(Text(f"{who}\n{how.replace(', ', chr(10))}", style=style), justify="right", style=style)
    for row, cells in rows(metrics):
        table.add_row(row.label, *cells)
    console.print(table)
    if metrics.targets:
        console.print()
        found = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
        for claim in metrics.targets:
            style = {True: "green", False: "red", None: "dim"}[claim.holds]
            value = "–" if claim.value is None else f"{claim.value:.2f}"
            found.add_row(claim.text, Text(value, justify="right"), claim.target, Text(status(claim), style=style))
        console.print(found)
    for note in notes(metrics):
        console.print(Text(note, style="dim"))
