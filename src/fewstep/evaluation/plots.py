"""Plots as inline SVG that takes its colors and fonts from the page around it, in light and dark alike."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Colors that the page replaces: matplotlib knows no CSS variables.
_INK, _FAINT, _ACCENT = "#010203", "#040506", "#070809"
_CSS = {_INK: "currentColor", _FAINT: "var(--faint)", _ACCENT: "var(--accent)"}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fewstep",
    "font.size": 9,
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), _INK),
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), _FAINT),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "lines.linewidth": 1.3,
}
_LEFT_OUT = ("lr", "nonfinite_skips", "seconds", "step")
_PANELS = 15


def curves(lines: Sequence[Mapping[str, Any]]) -> str | None:
    """A run's metrics.jsonl, a panel each, quality and losses first: faint as logged, strong averaged.

    None if nothing is there.
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
        key=lambda name: (not name.startswith("val/"), not name.endswith("/loss")),
    )
    shown = shown[:_PANELS]
    if not shown:
        return None
    rows = -(-len(shown) // 3)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(10.5, 2.1 * rows), layout="constrained")
        for index, name in enumerate(shown):
            axes = figure.add_subplot(rows, 3, index + 1)
            steps, values = zip(*series[name], strict=True)
            axes.plot(steps, values, color=_ACCENT, alpha=0.3, linewidth=0.8)
            axes.plot(steps, smooth(values), color=_ACCENT)
            axes.set_title(name)
            axes.margins(x=0.01)
            axes.locator_params(nbins=4)
        return _svg(figure)


def accuracy_by_nfe(points: Mapping[str, tuple[int, float]], ceiling: float | None) -> str:
    """Object accuracy (0 to 1) against NFE, by setting's title; `ceiling`: that of real images."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(6.4, 2.9), layout="constrained")
        axes: Axes = figure.add_subplot()
        if ceiling is not None:
            axes.axhline(100 * ceiling, color=_FAINT, linewidth=1, linestyle=(0, (4, 3)))
            axes.annotate("real images", (0.01, 100 * ceiling), (0, 3), xycoords=("axes fraction", "data"),
                          textcoords="offset points", color=_INK, alpha=0.7)  # fmt: skip
        last = 200.0
        for title, (nfe, accuracy) in sorted(points.items(), key=lambda item: -item[1][1]):
            is_student, percent = title.startswith("student"), 100 * accuracy
            axes.plot(nfe, percent, "o", color=_ACCENT if is_student else _INK, markersize=8 if is_student else 6)
            last = min(percent, last - 8)  # labels of near points keep apart
            outward = nfe > 16  # towards the middle of the plot
            axes.annotate(title, (nfe, last), (-9 if outward else 9, -1), textcoords="offset points",
                          ha="right" if outward else "left", va="center", color=_ACCENT if is_student else _INK,
                          weight="bold" if is_student else "normal")  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_xlim(2**-0.4, 2**0.6 * max(2, *(nfe for nfe, _ in points.values())))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_ylim(0, 110)
        axes.set_xlabel("NFE")
        axes.set_ylabel("object correct, %")
        return _svg(figure)


def smooth(values: Sequence[float], window: int = 15) -> list[float]:
    """Running means over `window` values around each, fewer at both ends."""
    around = [values[max(0, i - window // 2) : i + window // 2 + 1] for i in range(len(values))]
    return [sum(near) / len(near) for near in around]


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    for color, css in _CSS.items():
        text = text.replace(color, css)
    return text[text.index("<svg") :]  # without the XML head, which has no place inside a page
