"""The table and the curves of benchmarks/ablation.py."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

#: Metric -> its title, its factor, and its format.
METRICS = {
    "object_acc": ("object accuracy, %", 100, ".1f"),
    "nearest_real_acc": ("nearest real, %", 100, ".1f"),
    "style_acc": ("style accuracy, %", 100, ".1f"),
    "fd_teacher": ("FD to the teacher", 1, ".1f"),
    "diversity": ("diversity, ×1000", 1000, ".1f"),
    "saturation": ("saturation", 1, ".3f"),
    "hf_energy": ("hf energy, ×1000", 1000, ".3f"),
    "steps": ("steps", 1, ".0f"),
}


def arm_folder(out: Path, variant: str) -> Path:
    return out / variant.replace(", ", "-").replace(" ", "-")


def run_folder(out: Path, variant: str, seed: int) -> Path:
    return arm_folder(out, f"{variant}-{seed}")


def show(found: dict[str, list[dict[str, float | None]]], teacher: dict[str, dict[str, float | None]]) -> str:
    """A Markdown table of means over seeds with their range; also printed."""
    rows = {**{name: [one] for name, one in teacher.items()}, **found}
    return markdown(rows, METRICS, "Decoupled-DMD on the emoji dataset, 4 steps")


def markdown(
    found: Mapping[str, Sequence[Mapping[str, float | None]]],
    metrics: Mapping[str, tuple[str, float, str]],
    title: str,
) -> str:
    """A Markdown table, a row for each variant: of each metric the mean over seeds with its range; also printed.

    Args:
        metrics: key -> its title, its factor, and its format.
    """
    rows = [
        [name, *(_cell([one.get(key) for one in seeds], factor, style) for key, (_, factor, style) in metrics.items())]
        for name, seeds in found.items()
    ]
    columns = ["variant", *(each for each, _, _ in metrics.values())]
    table = Table(title=title)
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*row)
    Console(width=200).print(table)
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _cell(values: Sequence[float | None], factor: float, style: str) -> str:
    numbers = [factor * value for value in values if value is not None]
    if not numbers:
        return "–"
    mean = format(statistics.mean(numbers), style)
    return f"{mean} ({min(numbers):{style}} to {max(numbers):{style}})" if len(numbers) > 1 else mean


#: The curves: object accuracy, and the two metrics that rise with overbaking.
CURVES = {"val/object_acc": "object accuracy", "val/saturation": "saturation", "val/hf_energy": "hf energy"}


def draw_curves(folder: Path, variants: Sequence[str], seeds: Sequence[int]) -> Figure:
    """Validation metrics (64 prompts) against minutes of training, one line for each variant and seed."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    panels = figure.subplots(1, len(CURVES))
    for index, variant in enumerate(variants):
        for seed in seeds:
            file = run_folder(folder, variant, seed) / "metrics.jsonl"
            lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
            for panel, (key, title) in zip(panels, CURVES.items(), strict=True):
                points = [(line["seconds"] / 60, line[key]) for line in lines if key in line]
                style = {"color": colormaps["tab20"](index % 20), "marker": ".", "linewidth": 1}
                label = variant if seed == seeds[0] else None
                panel.plot(*(zip(*points, strict=True) if points else ([], [])), label=label, **style)
                panel.set_title(title, loc="left")
                panel.set_xlabel("minutes of training")
    for panel in panels[1:]:
        panel.set_yscale("log")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    return figure
