"""What a checkpoint costs a training: written at once, and in the background (``train.async_checkpoints``).

    python benchmarks/checkpoints.py [--out runs/checkpoints] [--width 1024] [--seconds 0.5]

A training whose steps do matrix products for about ``--seconds`` holds 13 ``--width``-squared matrices, with AdamW and
a moving average 16 bytes for each of their numbers, and saves a checkpoint after every eighth step. Prints by how many
seconds the eight steps after a checkpoint are slower than the last four of them (medians over checkpoints), for both
ways, and their ratio.
"""

from __future__ import annotations

import argparse
import shutil
import time
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from fewstep.config.sections import OptimSettings, TrainSettings
from fewstep.core.method import Batch, Method, Shard, Trainable
from fewstep.emoji.recipes import ClassifierRecipe
from fewstep.training.run_dir import RunDir
from fewstep.training.trainer import Trainer

EVERY, CHECKPOINTS, LAYERS, BATCH = 8, 6, 13, 64


class Products(Method):
    """A stack of linear layers that is trained towards its input, and computed ``repeats`` times more in each step."""

    def __init__(self, width: int, repeats: int) -> None:
        torch.manual_seed(0)
        self.net, self.repeats = nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(LAYERS)]), repeats
        self.trainables = [Trainable("student", self.net, self.loss)]
        self.times: list[float] = []

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            for _ in range(self.repeats):
                self.net(batch)
        return (self.net(batch) - batch).square().mean(), {}

    def after_step(self, step: int) -> dict[str, float]:
        self.times.append(time.perf_counter())
        return {}


def intervals(folder: Path, width: int, repeats: int, background: bool) -> Tensor:
    """Seconds of the steps after each checkpoint, [CHECKPOINTS, EVERY]; the first ones have its writing in them."""
    shutil.rmtree(folder, ignore_errors=True)
    steps = EVERY * (1 + CHECKPOINTS)
    train = {"steps": steps, "batch_size": BATCH, "log_every": steps, "save_every": EVERY}
    train["async_checkpoints"] = background
    recipe = {"kind": "classifier", "name": "none", "optim": {"lr": 1e-4}, "train": train}
    method = Products(width, repeats)

    def source(position: int, shard: Shard) -> Tensor:
        return torch.ones(BATCH, width)

    with RunDir(folder, ClassifierRecipe.model_validate(recipe)) as run:
        optim = {"student": OptimSettings(lr=1e-4, ema_decay=0.9)}
        Trainer(method, source, run, train=TrainSettings.model_validate(train), optim=optim).fit()
    shutil.rmtree(folder)
    found = torch.tensor([after - before for before, after in pairwise(method.times)])
    return found[EVERY - 1 :].unflatten(0, (CHECKPOINTS, EVERY))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/checkpoints"))
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=0.5)
    options = parser.parse_args()
    few, more = (float(intervals(options.out, options.width, n, background=True).median()) for n in (5, 25))
    repeats = max(round(5 + 20 * (options.seconds - few) / (more - few)), 0)
    added: dict[bool, float] = {}
    print(f"{16 * LAYERS * options.width**2 / 1e6:.0f} MB, {torch.get_num_threads()} threads")
    for background, name in ((False, "at once"), (True, "in the background")):
        found = intervals(options.out, options.width, repeats, background)
        step = found[:, EVERY // 2 :].median(dim=1).values
        added[background] = float((found.sum(dim=1) - EVERY * step).median())
        print(f"{name}: {added[background]:+.3f} s for each checkpoint; a step takes {step.median():.2f} s")
    print(f"ratio {added[True] / added[False]:.2f}")


if __name__ == "__main__":
    main()
