"""Plots as inline SVG that takes its colors and fonts from the page around it, in light and dark alike."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Colors that the page replaces: matplotlib knows no CSS variables.
INK, FAINT, ACCENT = "#010203", "#040506", "#070809"
_CSS = {INK: "currentColor", FAINT: "var(--faint)", ACCENT: "var(--accent)"}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fewstep",
    "font.size": 9,
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), INK),
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), FAINT),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "lines.linewidth": 1.3,
}
_LEFT_OUT = ("lr", "nonfinite_skips", "seconds", "step")
_PANELS = 15
_Y_MAX = 110  # percent, at the top of the accuracy plot
_LABEL_HEIGHT = 0.075  # of one title, in axes heights
_WINDOW = 15  # points in a running mean
_MIN_SMOOTHED = 3 * _WINDOW  # a running mean of fewer points hides their trend


def curves(lines: Sequence[Mapping[str, Any]]) -> str | None:
    """One panel for each metric of a run's metrics.jsonl, validation, losses and a discriminator's AUC first; None if
    there is none to plot.

    A long series is drawn faint, with its running mean on top; one too short for a mean, as validation often is, with
    its points.
    """
    names: dict[str, None] = {}
    for line in lines:
        names |= dict.fromkeys(key for key in line if key.rsplit("/", 1)[-1] not in _LEFT_OUT)
    series = {
        name: [(line["step"], line[name]) for line in lines if isinstance(line.get(name), int | float)]
        for name in names
    }
    shown = sorted(
        (name for name in series if len(series[name]) > 1),
        key=lambda name: (not name.startswith("val/"), not name.endswith("/loss"), "/auc" not in name),
    )
    shown = shown[:_PANELS]
    if not shown:
        return None
    rows = -(-len(shown) // 3)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.5, 2.1 * rows), layout="constrained")
        for index, name in enumerate(shown):
            axes = figure.add_subplot(rows, 3, index + 1)
            steps, values = zip(*series[name], strict=True)
            if len(values) < _MIN_SMOOTHED:
                axes.plot(steps, values, "o-", color=ACCENT, markersize=3)
            else:
                axes.plot(steps, values, color=ACCENT, alpha=0.3, linewidth=0.8)
                axes.plot(steps, smooth(values), color=ACCENT)
            axes.set_title(name)
            axes.margins(x=0.01)
            axes.locator_params(nbins=4)
        return svg(figure)


def relative_curves(lines: Sequence[Mapping[str, Any]], highlighted: str) -> str | None:
    """All validation metrics of a run on one axis, each over its first value, ``highlighted`` in the accent's color;
    None unless it was logged twice. What rises while others fall is bought from them.
    """
    series = {
        name: [(line["step"], line[name]) for line in lines if isinstance(line.get(name), int | float)]
        for name in dict.fromkeys(key for line in lines for key in line if key.startswith("val/"))
    }
    # a first value near 0 gives no ratio, and one of another sign turns it around
    shown = {name: points for name, points in series.items() if len(points) > 1 and points[0][1] > 1e-9}
    if highlighted not in shown:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.5, 3.2), layout="constrained")
        axes: Axes = figure.add_subplot()
        axes.axhline(1, color=FAINT, linewidth=0.8)
        styles = [(0, ()), (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5))]
        markers = ["", "o", "s"]  # with the styles: twelve lines that can be told apart
        for index, (name, points) in enumerate(shown.items()):
            steps, values = zip(*points, strict=True)
            own = name == highlighted
            axes.plot(
                steps,
                [value / values[0] for value in values],
                color=ACCENT if own else INK,
                linewidth=2.2 if own else 1.0,
                linestyle=styles[0] if own else styles[index % len(styles)],
                marker=None if own else markers[index // len(styles) % len(markers)],
                markersize=3,
                label=name.removeprefix("val/"),
            )
        axes.set_xlabel("step")
        axes.set_ylabel("over the first value")
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
        return svg(figure)


def accuracy_by_nfe(points: Mapping[str, tuple[int, float]], ceiling: float | None) -> str:
    """Object accuracy (0 to 1) against NFE, by setting's title; `ceiling`: that of real images."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.6, 2.9), layout="constrained")
        axes: Axes = figure.add_subplot()
        if ceiling is not None:
            axes.axhline(100 * ceiling, color=FAINT, linewidth=1, linestyle=(0, (4, 3)))
            axes.annotate("real images", (0.01, 100 * ceiling), (0, 3), xycoords=("axes fraction", "data"),
                          textcoords="offset points", color=INK, alpha=0.7)  # fmt: skip
        at_point: dict[tuple[int, float], list[str]] = {}
        for title, (nfe, accuracy) in points.items():
            at_point.setdefault((nfe, 100 * accuracy), []).append(title)
        for (nfe, percent), titles in at_point.items():
            color = ACCENT if any(map(_is_student, titles)) else INK
            axes.plot(nfe, percent, "o", color=color, markersize=8 if color == ACCENT else 6, clip_on=False)
        _add_labels(axes, at_point)
        axes.set_xscale("log", base=2)
        axes.set_xlim(2**-0.4, 2**0.6 * max(2, *(nfe for nfe, _ in points.values())))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_ylim(0, _Y_MAX)
        axes.set_xlabel("NFE")
        axes.set_ylabel("object correct, %")
        return svg(figure)


def _is_student(title: str) -> bool:
    return title.startswith("student")


def _add_labels(axes: Axes, at_point: Mapping[tuple[int, float], Sequence[str]]) -> None:
    """Titles in a column at the right of the axes, ordered as their points are, each joined to its point by a line.

    Beside the points they would cover one another: several settings often have nearly equal accuracies.
    """
    rows = [(point, title) for point in sorted(at_point, key=lambda p: (-p[1], -p[0])) for title in at_point[point]]
    heights = spread([percent / _Y_MAX for (_, percent), _ in rows], _LABEL_HEIGHT)
    for ((nfe, percent), title), height in zip(rows, heights, strict=True):
        color = ACCENT if _is_student(title) else INK
        axes.annotate(
            title, (nfe, percent), (1.03, height), textcoords="axes fraction", va="center", color=color,
            weight="bold" if color == ACCENT else "normal", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": FAINT, "linewidth": 0.7, "relpos": (0, 0.5),
                        "shrinkA": 2, "shrinkB": 4},
        )  # fmt: skip


def spread(heights: Sequence[float], distance: float) -> list[float]:
    """Descending heights, at least 0, moved apart to at least ``distance``: downwards, and upwards from 0."""
    lower = list(heights)
    for i in range(1, len(lower)):
        lower[i] = min(lower[i], lower[i - 1] - distance)
    return [max(height, (len(lower) - 1 - i) * distance) for i, height in enumerate(lower)]


def smooth(values: Sequence[float], window: int = _WINDOW) -> list[float]:
    """Running means over `window` values around each, fewer at both ends."""
    around = [values[max(0, i - window // 2) : i + window // 2 + 1] for i in range(len(values))]
    return [sum(near) / len(near) for near in around]


def svg(figure: Figure) -> str:
    """A figure that was drawn in ``STYLE``, as an SVG element."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    for color, css in _CSS.items():
        text = text.replace(color, css)
    return text[text.index("<svg") :]  # without the XML head, which has no place inside a page
