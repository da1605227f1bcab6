"""The time of a Decoupled-DMD step beside its bare forward and backward passes: optimizers, EMA, logging, the rest.

A real training records which model was called, on how many samples, with or without gradient. After each of its steps
the same calls are repeated alone, in the same order and precision, each with the backward pass of a plain loss where it
had one; the ratio is the training's time over theirs. The two alternate, so that a change of the machine's speed
affects both.

    python benchmarks/overhead.py [--model micro] [--batch 32] [--steps 24]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from fewstep.config.load import load_recipe
from fewstep.config.recipe import DistillRecipe
from fewstep.core.conditioning import EncodedPrompts
from fewstep.core.precision import uses_bf16
from fewstep.data.prompts import open_prompts
from fewstep.methods.base import DataSetup, MethodSetup
from fewstep.methods.dmd.method import DMD
from fewstep.methods.models_setup import build_models
from fewstep.models.pipeline import load
from fewstep.training.distributed import DistContext
from fewstep.training.run_dir import RunDir
from fewstep.training.trainer import Trainer

#: Which model was called, on how many samples, and whether a backward pass followed.
Call = tuple[str, int, bool]

WARM_UP = 3  # steps that are not counted
NUM_PROMPTS = 256  # about so many training prompts, spread over all of them: encoding every one takes a minute

#: CA and DM alone, from the first step on.
PLAIN = (
    *("method.terms={cfg_augmentation: {guidance_scale: 3.0}, distribution_matching: {}}", "method.fake_score_start=0"),
    *("evaluate.enabled=false", "train.sample_every=0"),
)


class BareCalls:
    """Records the calls of the models within a step, and repeats them alone."""

    def __init__(self, denoisers: dict[str, nn.Module], prompts: EncodedPrompts, shape: tuple[int, ...], bf16: bool):
        self.denoisers, self.prompts, self.shape, self.bf16 = denoisers, prompts, shape, bf16
        self.calls: list[Call] = []
        self.times: dict[Call, list[float]] = {}
        for name, denoiser in denoisers.items():
            denoiser.register_forward_pre_hook(lambda _, inputs, name=name: self.record(name, inputs))

    def record(self, name: str, inputs: tuple[torch.Tensor, ...]) -> None:
        self.calls.append((name, len(inputs[0]), name != "teacher" and torch.is_grad_enabled()))

    def repeat(self) -> float:
        """Seconds that the calls recorded since the last time take alone."""
        calls = list(self.calls)
        seconds = [self.repeat_one(call) for call in calls]
        for call, one in zip(calls, seconds, strict=True):
            self.times.setdefault(call, []).append(one)
        self.calls = []
        return sum(seconds)

    def repeat_one(self, call: Call) -> float:
        name, count, trained = call
        denoiser, x, sigma = self.denoisers[name], torch.randn(count, *self.shape), torch.rand(count)
        prompts = self.prompts[torch.randint(len(self.prompts), (count,))]
        start = time.perf_counter()
        with torch.set_grad_enabled(trained):
            with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
                loss = denoiser(x, sigma, prompts).square().mean()
            if trained:
                loss.backward()
        seconds = time.perf_counter() - start
        denoiser.zero_grad()
        return seconds


class MeasuredTrainer(Trainer):
    """A trainer whose steps, with logging and saving, are timed against their models' calls alone.

    Attributes:
        measured: seconds of each counted step, and of its calls alone.
    """

    bare_calls: BareCalls
    measured: list[tuple[float, float]]

    def take_step(self) -> dict[str, float]:
        self.step_start = time.perf_counter()
        return super().take_step()

    def _after_step(self) -> None:
        super()._after_step()
        seconds = time.perf_counter() - self.step_start
        alone = self.bare_calls.repeat()
        if self.step > WARM_UP:
            self.measured.append((seconds, alone))
        else:
            self.bare_calls.times.clear()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="micro")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=24)
    arguments = parser.parse_args()
    steps = WARM_UP + arguments.steps
    changes = (f"teacher={arguments.model}", f"train.batch_size={arguments.batch}", f"train.steps={steps}")
    recipe = load_recipe("micro-aligned", [*PLAIN, *changes])
    assert isinstance(recipe, DistillRecipe)
    teacher, every = load(recipe.teacher, "cpu"), open_prompts(recipe.prompts).texts("train")
    texts = every[:: len(every) // NUM_PROMPTS]
    shape = tuple(teacher.latent_shape(teacher.generation_config.height, teacher.generation_config.width))
    prompts = teacher.encode(texts)
    with tempfile.TemporaryDirectory() as folder, RunDir(Path(folder), recipe) as run:
        sources = DMD.batch_sources(DataSetup(recipe, teacher, texts, run.directory / "cache"))
        models = build_models(recipe, teacher, recipe.method.extra_models())
        method = DMD.build(MethodSetup(recipe, models, teacher.encode([""]), sources, texts, DistContext()))
        denoisers = {"teacher": teacher.denoiser, "student": models.student.denoiser, **models.extra}
        trainer = MeasuredTrainer(method, sources["train"], run, train=recipe.train, optim=recipe.optim)
        trainer.bare_calls = BareCalls(denoisers, prompts, shape, uses_bf16(recipe.train.precision, teacher.device))
        trainer.measured = []
        trainer.fit()

    table = Table(title=f"{arguments.steps} steps, batch {arguments.batch}, {torch.get_num_threads()} threads")
    for column in ("", "samples", "backward", "calls", "alone, ms (median)"):
        table.add_column(column, justify="left" if not column else "right")
    for (name, count, trained), times in sorted(trainer.bare_calls.times.items()):
        backward = "yes" if trained else "no"
        table.add_row(name, str(count), backward, str(len(times)), f"{1e3 * statistics.median(times):.0f}")
    Console().print(table)
    whole, alone = (sum(each) for each in zip(*trainer.measured, strict=True))
    ratios = [step / calls for step, calls in trainer.measured]
    print(
        f"the training {whole:.2f} s, its models alone {alone:.2f} s; ratio {whole / alone:.3f} "
        f"(median of a step's {statistics.median(ratios):.3f})"
    )


if __name__ == "__main__":
    main()
