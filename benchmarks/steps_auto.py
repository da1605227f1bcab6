"""Does it pay to choose the number of steps by the prompt? Quality against mean steps, on the emoji dataset.

    python benchmarks/steps_auto.py STUDENT [--out runs/steps-auto] [--prompts 450] [--test-prompts 150] [--seeds 2]

STUDENT serves 1, 2, 4 and 8 steps, such as that of

    python benchmarks/few_steps.py --arms "any, 4x"      # runs/few-steps/any-4x-0/student

Images of every prompt are made at each count from the same seeds. A judge makes the labels, as the reward of ``fewstep
steps train`` does. Choosers are trained and calibrated on prompts for training, and measured on test prompts beside

- each fixed count;
- the same mean steps for all prompts alike (a random share of them has the larger of two counts);
- the same counts, given to the prompts at random;
- early exit: 8 steps that end where the prediction of the final latent changes by less than a threshold.

One chooser sees the prompt, as ``--steps auto`` does; another also the first step's prediction, which is the same for
all counts; further ones have a budget of mean steps; an oracle knows the label of each test prompt. ``<out>`` gets
table.md, figures.json and plot.png. Scores are kept: the same command does not draw again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
from ablation_results import markdown
from safetensors.torch import load_file, save_file
from steps_auto_results import COUNTS, JUDGES, METRICS, Scores, draw, early_exit, languages, spent, spent_fixed
from torch import Tensor

from fewstep.atomic import write_text
from fewstep.config.sections import PromptSettings
from fewstep.core.seeds import generator
from fewstep.data.images import to_uint8
from fewstep.data.prompts import open_prompts
from fewstep.data.trajectories import template_hash
from fewstep.emoji.dataset import EmojiDataset
from fewstep.emoji.nearest_real import NearestReal
from fewstep.emoji.scorer import EmojiScorer
from fewstep.evaluation.step_labels import seed_noise, step_labels
from fewstep.evaluation.step_training import THRESHOLDS, train_on_features
from fewstep.inference.generate import GenerationStep, generate
from fewstep.inference.params import SamplingParams
from fewstep.inference.step_chooser import prompt_features
from fewstep.models.pipeline import TextToImagePipeline, load
from fewstep.rewards.open import open_reward
from fewstep.rewards.scorers import RewardScorer

CHANGES = tuple(0.02 * 1.3**power for power in range(16))  # of the prediction, relative: thresholds of early exit
BUDGETS = (1.25, 1.5, 1.75, 3.0)  # mean steps
POOL = 2  # the first prediction's regions, along each side


class Judges:
    """Scores of images by four judges, the first two from one pass of a feature network."""

    def __init__(self) -> None:
        self.real, self.objects, self.reward = NearestReal(), EmojiScorer(), RewardScorer(open_reward("emoji"))
        self.dataset = EmojiDataset.load()

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """[N] by judge."""
        specs = [spec for prompt in prompts if (spec := self.dataset.parse(prompt)) is not None]
        found, rows = torch.empty(len(prompts), len(self.dataset.objects)), torch.arange(len(prompts))
        for part in rows.split(50):
            found[part] = self.real.similarities(images[part], [specs[row].background for row in part.tolist()])
        own = torch.tensor([spec.object for spec in specs])
        (reward,) = self.reward.score(images, prompts).values()
        return {
            "similarity": found[rows, own],
            "nearest_real": (found.argmax(dim=1) == own).float(),
            "object": self.objects.score(images, prompts)["object_acc"],
            "reward": reward,
        }


def all_scores(model: TextToImagePipeline, prompts: Sequence[str], tests: int, seeds: int) -> Scores:
    """By judge: scores [N, K, S] at every count; "exit-" and the judge: [tests, 8, S] of the predictions after each of
    8 steps, of the last prompts; "changes" of these: [tests, 8, S], infinite at the first; "first": the pooled
    prediction of the first step, [N, S, F]."""
    judges, found = Judges(), dict[str, list[Tensor]]()
    for seed in range(seeds):
        columns: dict[str, list[Tensor]] = {}
        steps: list[GenerationStep] = []
        for count in COUNTS:
            steps = []
            params = SamplingParams(steps=count, seed=seed * len(prompts))
            images = generate(model, prompts, params, steps.append).images
            for name, scores in judges(images, prompts).items():
                columns.setdefault(name, []).append(scores)
            print(f"seed {seed}: images of {count} steps scored", flush=True)
        by_step = [torch.cat([each.x0 for each in steps if each.step == index + 1]) for index in range(COUNTS[-1])]
        found.setdefault("first", []).append(_pooled(by_step[0]))
        by_step = [x0[-tests:] for x0 in by_step]
        exits: dict[str, list[Tensor]] = {}
        for x0 in by_step[:-1]:
            for name, scores in judges(to_uint8(model.decode(x0)), prompts[-tests:]).items():
                exits.setdefault(name, []).append(scores)
        for name, column in columns.items():
            found.setdefault(name, []).append(torch.stack(column, dim=1))
            whole = [*exits[name], column[-1][-tests:]]
            found.setdefault(f"exit-{name}", []).append(torch.stack(whole, dim=1))
        changes = [torch.full((tests,), torch.inf)]
        changes += [_change(new, old) for old, new in pairwise(by_step)]
        found.setdefault("changes", []).append(torch.stack(changes, dim=1))
    return {name: torch.stack(parts, dim=1 if name == "first" else 2).contiguous() for name, parts in found.items()}


def _change(new: Tensor, old: Tensor) -> Tensor:
    return (new - old).flatten(1).norm(dim=1) / new.flatten(1).norm(dim=1)


def _pooled(x0: Tensor) -> Tensor:
    """Mean and deviation of each channel of latents [N, C, H, W] in POOL x POOL regions: [N, 2 C POOL^2]."""
    mean = torch.nn.functional.adaptive_avg_pool2d(x0, POOL)
    square = torch.nn.functional.adaptive_avg_pool2d(x0.square(), POOL)
    return torch.cat([mean, (square - mean.square()).clamp_min(0).sqrt()], dim=1).flatten(1).float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student")
    parser.add_argument("--out", type=Path, default=Path("runs/steps-auto"))
    parser.add_argument("--prompts", type=int, default=450, help="for training, a quarter of them for calibration")
    parser.add_argument("--test-prompts", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--labels", choices=JUDGES, default="similarity", help="the judge that makes the labels")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    split, tests = open_prompts(PromptSettings()), options.test_prompts
    texts = split.texts("train")
    order = torch.randperm(len(texts), generator=generator("step prompts", 0))[: options.prompts].tolist()
    prompts = [*(texts[index] for index in order), *split.texts("test")[:tests]]
    model, file = load(options.student), options.out / "scores.safetensors"
    if not file.exists():
        save_file(all_scores(model, prompts, tests, options.seeds), file)
    scores = load_file(file)
    train = {name: scores[name][:-tests] for name in (*JUDGES, "first")}
    test = {name: scores[name][-tests:] for name in scores}
    labels, made_by = train[options.labels], template_hash(model.encoder)
    features = prompt_features(model.encoder, prompts)
    by_prompt, study = train_on_features(features[:-tests], labels, COUNTS, made_by)

    # one row for each image: its own first prediction, and one score at each count
    seeds = options.seeds
    both = torch.cat([features[:, None].expand(-1, seeds, -1), scores["first"]], dim=2)
    rows_of_images = (both[:-tests].flatten(0, 1), _by_image(labels), COUNTS, made_by, study.noise * seeds**0.5)
    by_image, _ = train_on_features(*rows_of_images)
    per_image = {name: _by_image(test[name]) for name in JUDGES}
    needed = step_labels(test[options.labels], study.noise)
    rows = spent_fixed(test)
    choices = {
        "by the prompt": (test, _indices(by_prompt.choose, features[-tests:])),
        "by prompt and first prediction": (per_image, _indices(by_image.choose, both[-tests:].flatten(0, 1))),
        "by the test prompts' own labels": (test, needed),
    }
    for budget in BUDGETS:
        chooser, _ = train_on_features(features[:-tests], labels, COUNTS, made_by, budget=budget)
        choices[f"by the prompt, --mean-steps {budget:g}"] = (test, _indices(chooser.choose, features[-tests:]))
        chooser, _ = train_on_features(*rows_of_images, budget)
        seen = _indices(chooser.choose, both[-tests:].flatten(0, 1))
        choices[f"by prompt and first prediction, {budget:g}"] = (per_image, seen)
    for title, (judged, indices) in choices.items():
        rows |= spent(title, judged, indices)
    sweep = [
        spent("", test, _indices(replace(by_prompt, threshold=each).choose, features[-tests:]))[""]
        for each in THRESHOLDS
    ]
    exits = [early_exit(test, change) for change in CHANGES]
    rows["early exit of 8 steps"] = min(exits, key=lambda one: abs(one["steps"] - rows["by the prompt"]["steps"]))
    write_text(options.out / "table.md", markdown({name: [row] for name, row in rows.items()}, METRICS, "Test prompts"))
    how = {
        "labels": dict(zip(map(str, COUNTS), study.labels, strict=True)),
        "noise": study.noise,
        "seed_noise": {name: seed_noise(scores[name]) for name in JUDGES},
        "languages": languages(prompts[-tests:], test, _indices(by_prompt.choose, features[-tests:]), needed),
    }
    write_text(options.out / "figures.json", json.dumps({"rows": rows, **how}, indent=1))
    draw(rows, sweep, exits).savefig(options.out / "plot.png", dpi=110)
    print(json.dumps(how, indent=1))


def _by_image(scores: Tensor) -> Tensor:
    """Scores [N, K, S] as [N S, K, 1]."""
    return scores.transpose(1, 2).flatten(0, 1)[..., None].contiguous()


def _indices(choose: Callable[[Tensor], list[int]], features: Tensor) -> Tensor:
    return torch.tensor([COUNTS.index(count) for count in choose(features)])


if __name__ == "__main__":
    main()
