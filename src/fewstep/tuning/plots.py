"""Plots of a search, as inline SVG: which keys matter, and the objective against each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fewstep.evaluation.plots import ACCENT, FAINT, INK, STYLE, svg
from fewstep.tuning.results import ranked, short_names, shown
from fewstep.tuning.search import Search
from fewstep.tuning.space import Choices
from fewstep.tuning.study import TrialRow

_COLUMNS = 3


def importance(shares: Mapping[str, float]) -> str:
    """Bars of each key's share of the importance, the largest at the top."""
    ordered = sorted(shares, key=lambda key: shares[key])
    names = short_names(shares)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.6, 0.5 + 0.3 * len(shares)), layout="constrained")
        axes: Axes = figure.add_subplot()
        bars = axes.barh([names[key] for key in ordered], [100 * shares[key] for key in ordered], color=ACCENT)
        axes.bar_label(bars, fmt="%.0f%%", padding=3, color=INK)
        axes.set_xlim(0, 110)
        axes.set_xticks([])
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.spines["bottom"].set_visible(False)
        return svg(figure)


def slices(search: Search, rows: Sequence[TrialRow]) -> str:
    """The last score of every trial against each key's value; whole trials in color, the best one ringed."""
    names, order = short_names(search.space.keys), ranked(rows, search.objective)
    lines = -(-len(names) // _COLUMNS)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.5, 2.5 * lines), layout="constrained")
        for index, (key, part) in enumerate(search.space.keys.items()):
            axes: Axes = figure.add_subplot(lines, _COLUMNS, index + 1)
            places = _places(part, order, key)
            for row, place in zip(order, places, strict=True):
                whole = len(row.scores) == search.rungs
                color = ACCENT if whole else FAINT
                axes.plot(place, row.scores[-1], "o", color=color, markersize=5 if whole else 4, clip_on=False)
            axes.plot(places[0], order[0].scores[-1], "o", markersize=11, markerfacecolor="none", color=ACCENT)
            if isinstance(part, Choices):
                axes.set_xticks(range(len(part.values)), choice_names(part))
                axes.set_xlim(-0.5, len(part.values) - 0.5)
            elif part.log:
                axes.set_xscale("log")
                axes.xaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
                axes.xaxis.set_minor_formatter(lambda value, _: "")
            axes.set_title(names[key])
            if index % _COLUMNS == 0:
                axes.set_ylabel(search.objective.metric)
        return svg(figure)


def _places(part: object, rows: Sequence[TrialRow], key: str) -> list[float]:
    """Where each trial's value lies on a key's axis: itself, or the index of its choice."""
    if isinstance(part, Choices):
        labels = list(part.values)
        return [labels.index(row.drawn[key]) for row in rows]
    return [row.drawn[key] for row in rows]


def choice_names(part: Choices) -> list[str]:
    """Short names of choices; numbers from 1 in the file's order where these would not differ."""
    names = [text if len(text) <= 18 else text[:17] + "…" for text in map(shown, part.values.values())]
    return names if len(set(names)) == len(names) else [f"choice {number}" for number, _ in enumerate(names, 1)]
