"""The plots of a report."""

from __future__ import annotations

import re

import pytest

from fewstep.evaluation import plots


def test_validation_curves_come_first() -> None:
    lines = [{"step": step, "fake_score/loss": 1.0, "grad_norm": 1.0, "val/object_acc": 0.5} for step in (1, 2)]
    svg = plots.curves(lines)
    assert svg is not None
    positions = [svg.index(name) for name in ("val/object_acc", "fake_score/loss", "grad_norm")]
    assert positions == sorted(positions)


def curve_heights(count: int) -> list[int]:
    """Of each curve in the plot of a rising series, the number of its distinct heights."""
    svg = plots.curves([{"step": step, "val/object_acc": step / count} for step in range(count)])
    assert svg is not None
    curves = re.findall(r'<path d="([^"]*)" clip-path="[^"]*" style="[^"]*stroke: var\(--accent\)', svg)
    return [len(set(re.findall(r"[ML] \S+ (\S+)", curve))) for curve in curves]


def test_few_points_are_plotted_without_a_running_mean() -> None:
    """That of three validations would be a flat line."""
    assert curve_heights(3) == [3]
    raw, mean = curve_heights(60)
    assert raw >= mean > 3


def test_labels_move_apart_inside_the_plot() -> None:
    assert plots.spread([0.9, 0.9, 0.88, 0.4], 0.1) == pytest.approx([0.9, 0.8, 0.7, 0.4])
    assert plots.spread([0.01, 0.0, 0.0, 0.0], 0.1) == pytest.approx([0.3, 0.2, 0.1, 0.0])


def test_every_setting_is_labeled_in_the_plot_of_accuracy() -> None:
    equal = {"teacher, 4 steps": (4, 0.9), "student, 4 steps": (4, 0.9), "teacher, 50 steps": (100, 0.9)}
    svg = plots.accuracy_by_nfe(equal, ceiling=None)
    assert all(f">{title}</text>" in svg for title in equal)


def test_smoothing_averages_neighbors() -> None:
    assert plots.smooth([1.0, 2.0, 3.0, 4.0, 6.0], window=3) == pytest.approx([1.5, 2, 3, 13 / 3, 5])
    assert plots.curves([]) is None
