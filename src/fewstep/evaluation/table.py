"""The figures of an evaluation as rows and columns, for the terminal's summary and the report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fewstep.evaluation.feature_networks import with_network
from fewstep.evaluation.metrics_file import Figures, Metrics, Target, interval

Kind = Literal["percent", "number", "thousandths", "count", "milliseconds"]


@dataclass(frozen=True)
class Row:
    """A figure's key, its label and its format; ``group``: the group of prompts that it is of, None is all."""

    key: str
    label: str
    kind: Kind
    hint: str = ""
    group: str | None = None


#: Labels of known scores; others are shown by their key.
SCORES = {
    "object_acc": Row("object_acc", "object correct", "percent", "top-1 among all objects, by the classifier"),
    "style_acc": Row("style_acc", "style correct", "percent"),
    "background_acc": Row("background_acc", "background correct", "percent"),
    "nearest_real_acc": Row(
        *("nearest_real_acc", "nearest real correct", "percent"),
        "object of the nearest real emoji by features; falls with blur",
    ),
    "clip_score": Row("clip_score", "CLIP score", "number", "100 times the cosine of image and prompt"),
    "clip": Row("clip", "CLIP score", "number", "100 times the cosine of image and prompt"),
    "pickscore": Row("pickscore", "PickScore", "number"),
    "hpsv2": Row("hpsv2", "HPSv2.1", "number"),
    "imagereward": Row("imagereward", "ImageReward", "number"),
    "aesthetic": Row("aesthetic", "aesthetic score", "number", "LAION's predictor, about 1 to 10"),
    "ocr": Row("ocr", "text read by OCR", "percent", "1 - edit distance / length; no text where none is quoted"),
    "background": Row("background", "background color", "percent", "share of border pixels of the prompt's color"),
    "judge": Row("judge", "vision-language grade", "percent"),
}
#: The scores of the emoji dataset in the short summary; of other prompts, the first two scores.
HEADLINES = ("object_acc", "nearest_real_acc")
GROUPS = {"en": "English prompts", "zh": "Chinese prompts"}


def row_list(metrics: Metrics) -> list[Row]:
    """The rows of an evaluation: its scores, distances on its feature network, pixel statistics, cost."""
    network, first = metrics.features, next(iter(metrics.figures.values()))
    found: list[Row] = []
    for position, key in enumerate(metrics.run.get("scores", [])):
        found.append(SCORES.get(key, Row(key, key, "number")))
        if position == 0:
            for group in first.get("by_group", {}):
                found.append(Row(key, f"  {GROUPS.get(group, group)}", found[-1].kind, group=group))
    fd = "Fréchet distance to the many-step teacher's images"
    real = "Fréchet distance to real images; biased upwards, compare settings only"
    return [
        *found,
        Row(with_network("fd_teacher", network), f"FD to the teacher ({network})", "number", fd),
        Row(with_network("fd_real", network), f"FD to real ({network})", "number", real),
        Row(with_network("mmd_real", network), f"MMD to real ({network})", "number", "unbiased; 0 for equal sets"),
        Row(
            *(with_network("diversity", network), f"diversity ×1000 ({network})", "thousandths"),
            "mean cosine distance between seeds of one prompt",
        ),
        Row("saturation", "saturation", "number", "mean chroma, 0 to 1"),
        Row("contrast", "contrast", "number", "standard deviation of luma within an image"),
        Row("hf_energy", "hf energy, ×1000", "thousandths", "mean square of luma minus its 3×3 blur"),
        Row("sharpness", "sharpness", "number", "hf energy relative to real images of the same prompts"),
        Row("nfe", "NFE", "count", "transformer evaluations per image; guidance doubles them"),
        Row("seconds_per_image", "time per image", "milliseconds"),
    ]


def cell(figures: Figures, row: Row) -> str:
    """One figure as text; an en dash where there is none."""
    source = figures if row.group is None else figures.get("by_group", {}).get(row.group, {})
    value = source.get(row.key)
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
    """The head of a setting's column: the model, and how it was sampled."""
    if "steps" not in figures:
        return "real", "images"
    guidance = f"guidance {figures['guidance_scale']:g}" if figures["guidance_scale"] else "no guidance"
    return name.split("_")[0], f"{figures['steps']} {'step' if figures['steps'] == 1 else 'steps'}, {guidance}"


def columns(metrics: Metrics) -> dict[str, Figures]:
    """The settings, then the real images if there are any."""
    return metrics.figures | ({"real": metrics.real} if metrics.real else {})


def rows(metrics: Metrics) -> list[tuple[Row, list[str]]]:
    """The rows in which any column has a figure, with their cells."""
    table = [(row, [cell(figures, row) for figures in columns(metrics).values()]) for row in row_list(metrics)]
    return [(row, cells) for row, cells in table if set(cells) != {"–"}]


def notes(metrics: Metrics) -> list[str]:
    """The accuracy of the scorers, and the confidence interval of accuracies."""
    found: list[str] = []
    for name, own in metrics.scorers.items():
        figures = ", ".join(f"{key} {100 * value:.1f}%" for key, value in own.items() if key != "images")
        found.append(f"Scorer {name} on {own['images']:,.0f} real images: {figures}.")
    share = next(iter(metrics.figures.values())).get("object_acc")
    if share is not None:
        count = metrics.run["prompts_scored"]["object_acc"]
        half = 100 * interval(share, count)
        found.append(f"{count} prompts: 95% confidence interval of object_acc ±{half:.1f} points.")
    return found


def status(target: Target) -> str:
    """Whether a target is met, in words."""
    return {True: "pass", False: "fail", None: "not measured"}[target.passed]


def print_summary(metrics: Metrics, console: Console | None = None) -> None:
    """The table of settings, the targets with their values, and the accuracy of the scorers. Fits 80 columns."""
    console = console or Console()
    console.print(_terminal_table(metrics, rows(metrics)))
    if metrics.targets:
        console.print()
        found = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
        for target in metrics.targets:
            style = {True: "green", False: "red", None: "dim"}[target.passed]
            value = "–" if target.value is None else f"{target.value:.2f}"
            found.add_row(target.text, Text(value, justify="right"), target.target, Text(status(target), style=style))
        console.print(found)
    for note in notes(metrics):
        console.print(Text(note, style="dim"))


def print_short_summary(metrics: Metrics, console: Console | None = None) -> None:
    """At most five rows of the table of settings, and how many targets are met. Fits 80 columns."""
    console = console or Console()
    scores = [key for key in HEADLINES if key in metrics.run["scores"]] or metrics.run["scores"][:2]
    keys = {*scores, with_network("fd_teacher", metrics.features), "hf_energy", "seconds_per_image"}
    console.print(
        _terminal_table(metrics, [line for line in rows(metrics) if line[0].key in keys and not line[0].group])
    )
    if metrics.targets:
        met = sum(target.passed is True for target in metrics.targets)
        console.print(Text(f"targets met: {met} of {len(metrics.targets)}; the report has all figures", style="dim"))


def _terminal_table(metrics: Metrics, lines: list[tuple[Row, list[str]]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("", no_wrap=True)
    for name, figures in columns(metrics).items():
        who, how = label(name, figures)
        style = "bold cyan" if who == "student" else ""
        table.add_column(Text(f"{who}\n{how.replace(', ', chr(10))}", style=style), justify="right", style=style)
    for row, cells in lines:
        table.add_row(row.label, *cells)
    return table
