"""Does it pay to choose the number of steps by the prompt? Quality against mean steps, on the emoji dataset.

    python benchmarks/steps_auto.py STUDENT [--out runs/steps-auto] [--prompts 400] [--seeds 2]

STUDENT serves 1, 2, 4 and 8 steps, such as that of

    fewstep distill micro-turbo --out runs/any -s student.steps=8 -s student.step_counts=[1,2,4,8] -s train.steps=300

Images of every prompt are made at each count from the same seeds. The bundled reward makes the labels, as ``fewstep
steps train`` does; on the held-out quarter of the prompts the chooser stands beside

- each fixed count;
- the same mean steps for all prompts alike (a random share of them has the larger of two counts);
- the same counts, given to the prompts at random;
- early exit: 8 steps that end where the prediction of the final latent changes by less than a threshold.

Quality is the reward, and object accuracy by the nearest real emoji, which made no label. ``<out>`` gets table.md and
plot.png. Scores are kept: the same command does not draw again.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from ablation_results import markdown
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.atomic import write_text
from fewstep.config.sections import PromptSettings
from fewstep.core.seeds import generator
from fewstep.data.images import to_uint8
from fewstep.data.prompts import open_prompts
from fewstep.data.trajectories import template_hash
from fewstep.emoji.nearest_real import NearestReal
from fewstep.evaluation.step_labels import fixed_quality, mean_steps, quality, shuffled_quality
from fewstep.evaluation.step_training import THRESHOLDS, train_on_features
from fewstep.inference.generate import GenerationStep, generate
from fewstep.inference.params import SamplingParams
from fewstep.inference.step_chooser import StepChooser, prompt_features
from fewstep.models.pipeline import TextToImagePipeline, load
from fewstep.rewards.open import open_reward
from fewstep.rewards.scorers import RewardScorer

COUNTS = (1, 2, 4, 8)
JUDGES = ("reward", "nearest_real")
CHANGES = tuple(0.02 * 1.3**power for power in range(16))  # of the prediction, relative: thresholds of early exit
METRICS = {
    "steps": ("mean steps", 1, ".2f"),
    "reward": ("reward", 1, ".4f"),
    "nearest_real": ("nearest real, %", 100, ".1f"),
}


def drawn(model: TextToImagePipeline, prompts: Sequence[str], steps: int, first: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images of prompts; those predicted at each step, uint8 [steps, N, H, W, 3]; and the changes of the predictions,
    [steps, N], infinite at the first."""
    predicted: list[list[Tensor]] = [[] for _ in range(steps)]
    latents: list[Tensor] = []
    changes: list[list[Tensor]] = [[] for _ in range(steps)]

    def keep(step: GenerationStep) -> None:
        index = step.step - 1
        if index == 0:
            latents.clear()
            changes[index].append(torch.full((len(step.x0),), torch.inf))
        else:
            difference = (step.x0 - latents[-1]).flatten(1).norm(dim=1)
            changes[index].append(difference / step.x0.flatten(1).norm(dim=1))
        latents.append(step.x0)
        predicted[index].append(to_uint8(model.decode(step.x0)))

    images = generate(model, prompts, SamplingParams(steps=steps, seed=first), keep).images
    return images, torch.stack([torch.cat(part) for part in predicted]), torch.stack([torch.cat(p) for p in changes])


def all_scores(model: TextToImagePipeline, prompts: Sequence[str], seeds: int) -> dict[str, Tensor]:
    """By judge, "reward" and "nearest_real": scores [N, K, S] at every count; "exit-" and the judge: [N, 8, S] of the
    predictions after each of 8 steps; "changes": [N, 8, S]."""
    judges = {"reward": RewardScorer(open_reward("emoji")), "nearest_real": NearestReal()}
    found: dict[str, list[Tensor]] = {}
    for seed in range(seeds):
        columns: dict[str, list[Tensor]] = {name: [] for name in JUDGES}
        for count in COUNTS:
            images, predicted, changes = drawn(model, prompts, count, seed * len(prompts))
            for name, judge in judges.items():
                (scores,) = judge.score(images, prompts).values()
                columns[name].append(scores)
        for name, judge in judges.items():
            found.setdefault(name, []).append(torch.stack(columns[name], dim=1))
            exits = [next(iter(judge.score(part, prompts).values())) for part in predicted]
            found.setdefault(f"exit-{name}", []).append(torch.stack(exits, dim=1))
        found.setdefault("changes", []).append(changes.T)
    return {name: torch.stack(parts, dim=2).contiguous() for name, parts in found.items()}


def early_exit(scores: dict[str, Tensor], change: float) -> dict[str, float]:
    """Mean steps and scores when 8 steps end at the first change below ``change``."""
    small = scores["changes"] < change
    small[:, -1] = True
    ends = small.long().argmax(dim=1, keepdim=True)
    found = {name: float(scores[f"exit-{name}"].gather(1, ends).mean()) for name in JUDGES}
    return {"steps": float(ends.float().mean()) + 1, **found}


def chosen(chooser: StepChooser, features: Tensor, scores: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """The chooser, and the same cost spent without a look at the prompts."""
    indices = torch.tensor([COUNTS.index(count) for count in chooser.choose(features)])
    steps = mean_steps(COUNTS, indices)
    return {
        "chosen": {"steps": steps, **{name: quality(scores[name], indices) for name in JUDGES}},
        "all alike": {"steps": steps, **{name: fixed_quality(scores[name], COUNTS, steps) for name in JUDGES}},
        "at random": {"steps": steps, **{name: shuffled_quality(scores[name], indices) for name in JUDGES}},
    }


def draw(
    rows: dict[str, dict[str, float]], sweep: Sequence[dict[str, float]], exits: Sequence[dict[str, float]]
) -> Figure:
    """Quality against mean steps, one panel for each judge."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for panel, name in zip(figure.subplots(1, 2), JUDGES, strict=True):
        title, factor, _ = METRICS[name]
        fixed = [rows[f"{count} steps"] for count in COUNTS]
        for label, points, style in (("fixed", fixed, "o-"), ("chosen", sweep, "."), ("early exit", exits, "x")):
            panel.plot([one["steps"] for one in points], [factor * one[name] for one in points], style, label=label)
        panel.set_title(title, loc="left")
        panel.set_xlabel("mean steps")
        panel.legend(frameon=False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student")
    parser.add_argument("--out", type=Path, default=Path("runs/steps-auto"))
    parser.add_argument("--prompts", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    texts = open_prompts(PromptSettings()).texts("train")
    order = torch.randperm(len(texts), generator=generator("step prompts", 0))[: options.prompts].tolist()
    prompts, model, file = [texts[index] for index in order], load(options.student), options.out / "scores.safetensors"
    if not file.exists():
        save_file(all_scores(model, prompts, options.seeds), file)
    scores, features = load_file(file), prompt_features(model.encoder, prompts)
    chooser, study = train_on_features(features, scores["reward"], COUNTS, template_hash(model.encoder))
    held_out = len(prompts) // 4
    rest, judged = features[-held_out:], {name: part[-held_out:] for name, part in scores.items()}
    rows = {
        f"{count} steps": {"steps": count, **{name: float(judged[name][:, index].mean()) for name in JUDGES}}
        for index, count in enumerate(COUNTS)
    }
    rows |= chosen(chooser, rest, judged)
    sweep = [chosen(replace(chooser, threshold=each), rest, judged)["chosen"] for each in THRESHOLDS]
    exits = [early_exit(judged, change) for change in CHANGES]
    same = min(exits, key=lambda one: abs(one["steps"] - rows["chosen"]["steps"]))
    rows["early exit of 8 steps"] = same
    table = markdown({name: [row] for name, row in rows.items()}, METRICS, "Steps by the prompt, held-out prompts")
    write_text(options.out / "table.md", table)
    draw(rows, sweep, exits).savefig(options.out / "plot.png", dpi=110)
    needed = ", ".join(f"{n} need {count}" for count, n in zip(COUNTS, study.labels, strict=True))
    print(f"labels of the training prompts: {needed}; noise of the seeds {study.noise:.4f}")


if __name__ == "__main__":
    main()
