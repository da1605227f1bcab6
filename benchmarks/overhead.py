"""What a step of Decoupled-DMD costs beside its bare forwards and backwards: optimizers, averaging, logging, the rest.

A real training counts which model spoke how often, on how many samples, with or without gradient. Each of these calls
is then timed alone, forward and backward of a plain loss, with the same precision; the ratio is the training's time
over their sum. The two take turns, a few steps each, so that a machine whose speed drifts drifts for both.

    python benchmarks/overhead.py [--model micro] [--batch 32] [--steps 24]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from fewstep.data.prompts import training_prompts
from fewstep.distill.roles import make_roles
from fewstep.distill.run import dmd_job
from fewstep.models.pipeline import load
from fewstep.models.prompts import EncodedPrompts
from fewstep.recipes.load import load_recipe
from fewstep.recipes.schema import DistillRecipe
from fewstep.training.distribution import Ranks
from fewstep.training.precision import uses_bf16
from fewstep.training.run import Run
from fewstep.training.trainer import Trainer

#: Who spoke, on how many samples, and whether a backward followed.
Call = tuple[str, int, bool]

CHUNK = 4  # steps of the training between one look at the calls alone and the next

PLAIN = ("align=0", "fake_warmup=0", "shield.regression=0", "evaluate.enabled=false", "train.preview_every=0")


class Counted:
    """Counts the calls of denoisers."""

    def __init__(self, denoisers: dict[str, nn.Module]) -> None:
        self.calls: Counter[Call] = Counter()
        for name, denoiser in denoisers.items():
            denoiser.register_forward_pre_hook(lambda _, inputs, name=name: self.count(name, inputs))

    def count(self, name: str, inputs: tuple[torch.Tensor, ...]) -> None:
        self.calls[name, len(inputs[0]), name != "teacher" and torch.is_grad_enabled()] += 1


def alone(denoiser: nn.Module, call: Call, prompts: EncodedPrompts, shape: tuple[int, ...], bf16: bool) -> float:
    """Seconds of one such call."""
    _, count, learns = call
    x, sigma = torch.randn(count, *shape), torch.rand(count)
    chosen = prompts[torch.arange(count) % len(prompts)]
    start = time.perf_counter()
    with torch.set_grad_enabled(learns):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = denoiser(x, sigma, chosen).square().mean()
        if learns:
            loss.backward()
    took = time.perf_counter() - start
    denoiser.zero_grad()
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="micro")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=24)
    arguments = parser.parse_args()

    def recipe_of(steps: int) -> DistillRecipe:
        sizes = (f"teacher={arguments.model}", f"train.batch_size={arguments.batch}", f"train.steps={steps}")
        recipe = load_recipe("micro-turbo", [*PLAIN, *sizes])
        assert isinstance(recipe, DistillRecipe)
        return recipe

    recipe = recipe_of(arguments.steps)
    teacher, texts = load(recipe.teacher), training_prompts(recipe.prompts)
    roles = make_roles(recipe, teacher)
    job = dmd_job(recipe, roles, texts, None, Ranks())
    optim = {name: settings for name, settings in recipe.optim if settings is not None}
    denoisers = {"teacher": teacher.denoiser, "student": roles.student.denoiser, "fake": roles.fake}
    counted = Counted(denoisers)
    prompts = teacher.encode(texts[:: len(texts) // 256])
    shape = tuple(teacher.latent_shape(teacher.card.height, teacher.card.width))
    bf16 = uses_bf16(recipe.train.precision, teacher.device)
    calls: Counter[Call] = Counter()
    times: dict[Call, list[float]] = {}
    seconds = total = done = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for steps in range(3, 4 + arguments.steps, CHUNK):  # the first chunk warms up
            with Run(Path(folder), recipe_of(steps)) as run:
                trainer = Trainer(job.method, job.data, run, train=recipe_of(steps).train, optim=optim)
                counted.calls.clear()
                trainer.fit()
            made, took, done = Counter(counted.calls), trainer.seconds - done, trainer.seconds
            each: dict[Call, float] = {}
            for call in made:
                each[call] = statistics.median(alone(denoisers[call[0]], call, prompts, shape, bf16) for _ in range(3))
            if steps > 3:
                calls += made
                seconds += took
                total += sum(number * each[call] for call, number in made.items())
                for call, one in each.items():
                    times.setdefault(call, []).append(one)

    table = Table(title=f"{arguments.steps} steps, batch {arguments.batch}, {torch.get_num_threads()} threads")
    for column in ("", "samples", "backward", "calls", "alone, ms (median)", "sum, s"):
        table.add_column(column, justify="left" if not column else "right")
    for (name, count, learns), number in sorted(calls.items()):
        middle = statistics.median(times[name, count, learns])
        learning = "yes" if learns else "no"
        table.add_row(name, str(count), learning, str(number), f"{1e3 * middle:.0f}", f"{number * middle:.2f}")
    Console().print(table)
    print(f"sum of the models alone {total:.2f} s; the training {seconds:.2f} s; ratio {seconds / total:.3f}")


if __name__ == "__main__":
    main()
