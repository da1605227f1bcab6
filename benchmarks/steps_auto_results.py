"""Rows and plot of benchmarks/steps_auto.py: what a choice of step counts gives, beside the same cost spent blindly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from torch import Tensor

from fewstep.emoji.dataset import EmojiDataset
from fewstep.evaluation.step_labels import fixed_quality, mean_steps, quality, shuffled_quality

Scores = dict[str, Tensor]
Row = dict[str, float]

COUNTS = (1, 2, 4, 8)
JUDGES = ("similarity", "nearest_real", "object", "reward")
GAINS = ("similarity", "nearest_real")
METRICS = {
    "steps": ("mean steps", 1, ".2f"),
    "similarity": ("similarity", 1, ".4f"),
    "nearest_real": ("nearest real, %", 100, ".1f"),
    "object": ("object accuracy, %", 100, ".1f"),
    "reward": ("reward", 1, ".4f"),
    "similarity_gain": ("gain in similarity over all alike", 1, "+.4f"),
    "similarity_interval": ("± (95%)", 1, ".4f"),
    "nearest_real_gain": ("gain in nearest real, points", 100, "+.1f"),
    "nearest_real_interval": ("± (95%)", 100, ".1f"),
}


def spent_fixed(scores: Mapping[str, Tensor]) -> dict[str, Row]:
    """All prompts at one count."""
    return {
        f"{count} {'step' if count == 1 else 'steps'}": {
            "steps": count,
            **{name: float(scores[name][:, index].mean()) for name in JUDGES},
        }
        for index, count in enumerate(COUNTS)
    }


def spent(title: str, scores: Mapping[str, Tensor], indices: Tensor) -> dict[str, Row]:
    """A choice of counts, and the same cost spent without a look at the prompts. The gain over the latter has the
    interval of a mean over prompts."""
    steps = mean_steps(COUNTS, indices)
    alike = {name: fixed_quality(scores[name], COUNTS, steps) for name in JUDGES}
    gains = {name: _gain(scores[name].mean(dim=2), indices, steps) for name in GAINS}
    return {
        title: {
            "steps": steps,
            **{name: quality(scores[name], indices) for name in JUDGES},
            **{f"{name}_{key}": value for name, found in gains.items() for key, value in found.items()},
        },
        f"{title}: all alike": {"steps": steps, **alike},
        f"{title}: at random": {"steps": steps, **{name: shuffled_quality(scores[name], indices) for name in JUDGES}},
    }


def _gain(means: Tensor, indices: Tensor, steps: float) -> dict[str, float]:
    """Of means [N, K] at the chosen counts over a mixture of two counts with the same mean steps."""
    upper = next(index for index, count in enumerate(COUNTS) if count >= steps)
    lower = max(upper - 1, 0)
    share = 1.0 if upper == lower else (steps - COUNTS[lower]) / (COUNTS[upper] - COUNTS[lower])
    difference = means.gather(1, indices[:, None])[:, 0] - (1 - share) * means[:, lower] - share * means[:, upper]
    return {"gain": float(difference.mean()), "interval": float(1.96 * difference.std() / len(difference) ** 0.5)}


def early_exit(scores: Mapping[str, Tensor], change: float) -> Row:
    """Mean steps and scores when 8 steps end at the first change below ``change``."""
    small = scores["changes"] < change
    small[:, -1] = True
    ends = small.long().argmax(dim=1, keepdim=True)
    found = {name: float(scores[f"exit-{name}"].gather(1, ends).mean()) for name in JUDGES}
    return {"steps": float(ends.float().mean()) + 1, **found}


def languages(prompts: Sequence[str], scores: Mapping[str, Tensor], indices: Tensor, needed: Tensor) -> dict[str, Row]:
    """By language and style of the prompt: prompts, mean steps chosen and needed, nearest real at 1 and 8 steps."""
    dataset, groups = EmojiDataset.load(), dict[str, list[int]]()
    for row, prompt in enumerate(prompts):
        spec = dataset.parse(prompt)
        if spec is not None:
            for group in (spec.language, spec.style):
                groups.setdefault(group, []).append(row)
    return {
        group: {
            "prompts": len(rows),
            "chosen": mean_steps(COUNTS, indices[rows]),
            "needed": mean_steps(COUNTS, needed[rows]),
            "nearest_real at 1": float(scores["nearest_real"][rows, 0].mean()),
            "nearest_real at 8": float(scores["nearest_real"][rows, -1].mean()),
        }
        for group, rows in groups.items()
    }


def draw(rows: Mapping[str, Row], sweep: Sequence[Row], exits: Sequence[Row]) -> Figure:
    """Quality against mean steps, one panel for each of two judges."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for panel, name in zip(figure.subplots(1, 2), JUDGES[:2], strict=True):
        title, factor, _ = METRICS[name]
        fixed = [row for key, row in rows.items() if key.endswith((" step", " steps")) and key[0].isdigit()]
        oracle = [row for key, row in rows.items() if key.endswith("own labels")]
        series = (
            ("fixed", fixed, "o-"),
            ("chosen by the prompt", sweep, "."),
            ("early exit", exits, "x"),
            ("the prompts' own labels", oracle, "*"),
        )
        for label, points, style in series:
            panel.plot([one["steps"] for one in points], [factor * one[name] for one in points], style, label=label)
        panel.set_title(title, loc="left")
        panel.set_xlabel("mean steps")
        panel.legend(frameon=False)
    return figure
