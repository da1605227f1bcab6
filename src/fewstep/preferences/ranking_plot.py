"""The plot of a ranking: a point and an interval for each model."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from fewstep.atomic import atomic_file
from fewstep.preferences.ranking import LEVEL, Ranking


def write_plot(ranking: Ranking, file: str | Path) -> None:
    """Write a PNG, the best model at the top. Raises: UserError if it cannot be written."""
    models = ranking.models[::-1]
    figure = Figure(figsize=(7.2, 0.9 + 0.42 * len(models)), layout="constrained")
    axes = figure.add_subplot()
    for row, one in enumerate(models):
        axes.plot([one.low, one.high], [row, row], color="#0b6bcb", linewidth=2, solid_capstyle="round")
        axes.plot(one.elo, row, "o", color="#0b6bcb", markersize=7)
        axes.annotate(f"{one.elo:.0f}", (one.elo, row), (0, 7), textcoords="offset points", ha="center", fontsize=8)
    axes.set_yticks(range(len(models)), [one.model for one in models])
    axes.set_ylim(-0.6, len(models) - 0.3)
    axes.grid(axis="x", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(f"Elo, {LEVEL:.0%} intervals; {ranking.votes} votes on {ranking.prompts} prompts")
    with atomic_file(file) as aside:
        figure.savefig(aside, format="png", dpi=150)
