"""What a step of Decoupled-DMD costs beside its bare forwards and backwards: optimizers, averaging, logging, the rest.

A real training notes which model spoke, on how many samples, with or without gradient. After each of its steps the same
calls are made again alone, in the same order and precision, each with the backward of a plain loss where it had one;
the ratio is the training's time over theirs. Turn by turn, so that a machine whose speed drifts drifts for both.

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
from fewstep.jobs import dmd_job
from fewstep.methods.models_setup import build_models
from fewstep.models.pipeline import load
from fewstep.training.distributed import DistContext
from fewstep.training.run_dir import RunDir
from fewstep.training.trainer import Trainer

#: Who spoke, on how many samples, and whether a backward followed.
Call = tuple[str, int, bool]

WARM_UP = 3  # steps that are not counted

PLAIN = ("align=0", "fake_warmup=0", "shield.regression=0", "evaluate.enabled=false", "train.sample_every=0")


class Alone:
    """The calls of a step's models, noted as they are made, and made again by themselves."""

    def __init__(self, denoisers: dict[str, nn.Module], prompts: EncodedPrompts, shape: tuple[int, ...], bf16: bool):
        self.denoisers, self.prompts, self.shape, self.bf16 = denoisers, prompts, shape, bf16
        self.calls: list[Call] = []
        self.times: dict[Call, list[float]] = {}
        for name, denoiser in denoisers.items():
            denoiser.register_forward_pre_hook(lambda _, inputs, name=name: self.note(name, inputs))

    def note(self, name: str, inputs: tuple[torch.Tensor, ...]) -> None:
        self.calls.append((name, len(inputs[0]), name != "teacher" and torch.is_grad_enabled()))

    def again(self) -> float:
        """Seconds that the calls noted since the last time take alone."""
        calls = list(self.calls)
        each = [self.once(call) for call in calls]
        for call, took in zip(calls, each, strict=True):
            self.times.setdefault(call, []).append(took)
        self.calls = []
        return sum(each)

    def once(self, call: Call) -> float:
        name, count, learns = call
        denoiser, x, sigma = self.denoisers[name], torch.randn(count, *self.shape), torch.rand(count)
        chosen = self.prompts[torch.randint(len(self.prompts), (count,))]
        start = time.perf_counter()
        with torch.set_grad_enabled(learns):
            with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
                loss = denoiser(x, sigma, chosen).square().mean()
            if learns:
                loss.backward()
        took = time.perf_counter() - start
        denoiser.zero_grad()
        return took


class Measured(Trainer):
    """A trainer whose steps, with what is logged and saved after them, are timed against their models alone."""

    alone: Alone

    def _take_step(self) -> dict[str, float]:
        self.began = time.perf_counter()
        return super()._take_step()

    def _log_and_save(self) -> None:
        super()._log_and_save()
        took = time.perf_counter() - self.began
        models = self.alone.again()
        if self.step > WARM_UP:
            self.measured = [*getattr(self, "measured", []), (took, models)]
        else:
            self.alone.times.clear()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="micro")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=24)
    arguments = parser.parse_args()
    steps = WARM_UP + arguments.steps
    changes = (f"teacher={arguments.model}", f"train.batch_size={arguments.batch}", f"train.steps={steps}")
    recipe = load_recipe("micro-turbo", [*PLAIN, *changes])
    assert isinstance(recipe, DistillRecipe)
    teacher, texts = load(recipe.teacher), open_prompts(recipe.prompts).texts("train")
    roles = build_models(recipe, teacher)
    job = dmd_job(recipe, roles, texts, None, DistContext())
    optim = {name: settings for name, settings in recipe.optim if settings is not None}
    denoisers = {"teacher": teacher.denoiser, "student": roles.student.denoiser, "fake": roles.fake}
    shape = tuple(teacher.latent_shape(teacher.generation_config.height, teacher.generation_config.width))
    prompts = teacher.encode(texts[:: len(texts) // 256])
    with tempfile.TemporaryDirectory() as folder, RunDir(Path(folder), recipe) as run:
        trainer = Measured(job.method, job.data, run, train=recipe.train, optim=optim)
        trainer.alone = Alone(denoisers, prompts, shape, uses_bf16(recipe.train.precision, teacher.device))
        trainer.fit()

    table = Table(title=f"{arguments.steps} steps, batch {arguments.batch}, {torch.get_num_threads()} threads")
    for column in ("", "samples", "backward", "calls", "alone, ms (median)"):
        table.add_column(column, justify="left" if not column else "right")
    for (name, count, learns), times in sorted(trainer.alone.times.items()):
        learning = "yes" if learns else "no"
        table.add_row(name, str(count), learning, str(len(times)), f"{1e3 * statistics.median(times):.0f}")
    Console().print(table)
    whole, models = (sum(each) for each in zip(*trainer.measured, strict=True))
    ratios = [took / alone for took, alone in trainer.measured]
    print(
        f"the training {whole:.2f} s, its models alone {models:.2f} s; ratio {whole / models:.3f} "
        f"(median of a step's {statistics.median(ratios):.3f})"
    )


if __name__ == "__main__":
    main()
