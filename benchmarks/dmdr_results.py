"""The table, the targets and the plot of benchmarks/dmdr.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ablation_results import METRICS, markdown
from matplotlib import colormaps
from matplotlib.figure import Figure

Figures = Mapping[str, float | None]

#: Of validation, the metrics whose sum chooses a learning rate.
SELECTED_BY = ("val/object_acc", "val/nearest_real_acc")
TEACHER, DISTILLED, REAL = "teacher, 50 steps", "distillation only", "real images"
#: Metric -> its title, its factor, and its format.
COLUMNS = METRICS | {
    "emoji": ("reward (trained on)", 1, ".3f"),
    "minutes": ("minutes after the cold start", 1, ".1f"),
    "lr": ("learning rate", 1, ".1e"),
}


def table(found: Mapping[str, Sequence[Figures]], reference: Mapping[str, Figures]) -> str:
    """A Markdown table of means over seeds with their range; also printed."""
    return markdown({**{name: [one] for name, one in reference.items()}, **found}, COLUMNS, "DMDR, 4 steps")


def best_rate(tried: Mapping[float, Mapping[str, float]]) -> float:
    """The learning rate with the highest sum of the metrics that decide, of metrics on validation prompts."""
    return max(tried, key=lambda lr: sum(tried[lr][key] for key in SELECTED_BY))


def tuning_table(tried: Mapping[str, Mapping[float, Mapping[str, float]]]) -> str:
    """A Markdown table of what decided, object accuracy and nearest real, by arm; the chosen learning rate is bold."""
    lines = ["| arm | a third of the rate | the arm's own | three times |", "|---|---|---|---|"]
    for name, rates in tried.items():
        cells = []
        for lr, metrics in sorted(rates.items()):
            cell = f"{lr:.1e}: " + ", ".join(f"{100 * metrics[key]:.1f}%" for key in SELECTED_BY)
            cells.append(f"**{cell}**" if lr == best_rate(rates) else cell)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def targets(found: Mapping[str, Sequence[Figures]], reference: Mapping[str, Figures]) -> str:
    """In how many seeds each arm is better than the teacher without the marks of reward hacking.

    Diversity, saturation and high-frequency energy are compared with the student that was only distilled, seed by seed;
    without such students these are left out.
    """
    teacher, real = reference[TEACHER], reference[REAL]
    distilled = found.get(DISTILLED, [])
    lines = ["| arm | " + " | ".join(_TARGETS) + " |", "|---" * (1 + len(_TARGETS)) + "|"]
    for name, seeds in found.items():
        # an arm may have fewer seeds than the distilled students, while the study runs
        plain = [*distilled, *[None] * len(seeds)][: len(seeds)]
        held = [_held(one, teacher, real, other) for one, other in zip(seeds, plain, strict=True)]
        cells = [_count([each[title] for each in held]) for title in _TARGETS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


_TARGETS = (
    *("nearest real at least 5 points above the teacher", "object accuracy", "style accuracy"),
    *("diversity at least 90% of the distilled", "saturation nearer to real", "hf energy nearer to real"),
)


def _held(one: Figures, teacher: Figures, real: Figures, distilled: Figures | None) -> dict[str, bool | None]:
    def value(figures: Figures, key: str) -> float:
        return figures[key] or 0.0

    def nearer(key: str) -> bool | None:
        if distilled is None:
            return None
        return abs(value(one, key) - value(real, key)) < abs(value(distilled, key) - value(real, key))

    diverse = None if distilled is None else value(one, "diversity") >= 0.9 * value(distilled, "diversity")
    above = value(one, "nearest_real_acc") >= value(teacher, "nearest_real_acc") + 0.05
    no_lower = [value(one, key) >= value(teacher, key) for key in ("object_acc", "style_acc")]
    return dict(zip(_TARGETS, (above, *no_lower, diverse, nearer("saturation"), nearer("hf_energy")), strict=True))


def _count(held: Sequence[bool | None]) -> str:
    known = [each for each in held if each is not None]
    return f"{sum(known)} of {len(known)}" if known else "–"


def draw(found: Mapping[str, Sequence[Figures]], reference: Mapping[str, Figures]) -> Figure:
    """The reward that is trained on against the nearest real accuracy and the diversity, one point for each seed."""
    figure = Figure(figsize=(13, 5), layout="constrained")
    panels = figure.subplots(1, 2)
    for panel, key in zip(panels, ("nearest_real_acc", "diversity"), strict=True):
        title, factor, _ = COLUMNS[key]
        for name, marker in ((TEACHER, "*"), (REAL, "P")):
            one = reference[name]
            panel.plot(one["emoji"], factor * (one[key] or 0), marker, color="black", label=name, markersize=10)
        for index, (name, seeds) in enumerate(found.items()):
            points = [(one["emoji"], factor * (one[key] or 0)) for one in seeds]
            panel.plot(*zip(*points, strict=True), "o", color=colormaps["tab20"](index % 20), label=name)
        panel.set_xlabel("reward (trained on)")
        panel.set_title(title, loc="left")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    return figure
