"""A program for torchrun: one step of a sharded distillation; the bytes that this process held and received."""

import json
import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from fewstep.config.load import load_recipe
from fewstep.data.prompts import open_prompts
from fewstep.methods.base import DataSetup, MethodSetup
from fewstep.methods.dmd.method import DMD
from fewstep.methods.models_setup import build_models
from fewstep.models.pipeline import load
from fewstep.training.distributed import init_distributed
from fewstep.training.train_state import TrainState


def held(tensors) -> int:  # type: ignore[no-untyped-def]
    """Bytes of this process's parts, without scalars such as counts of steps."""
    parts = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    return sum(part.numel() * part.element_size() for part in parts if part.ndim)


class Received(TorchDispatchMode):
    """Counts the bytes that collectives receive from other processes."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = self.gradients = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        size = lambda t: t.numel() * t.element_size()  # noqa: E731
        if func is torch.ops.c10d._allgather_base_.default:
            self.weights += size(args[0]) - size(args[1])
        if func is torch.ops.c10d._reduce_scatter_base_.default:
            self.gradients += size(args[1]) - size(args[0])
        return func(*args, **(kwargs or {}))


def main(folder: str, precision: str, out: str) -> None:
    settings = ("student.steps=1", "method.fake_score_updates=2", "method.fake_score_start=0", "train.on_alert=off")
    settings += ("method.terms={cfg_augmentation: {}, distribution_matching: {}}",)
    sizes = ("train.batch_size=4", f"train.precision={precision}", "optim.student={lr: 1.0e-4, ema_decay: 0.9}")
    recipe = load_recipe("micro-aligned", [f"teacher={folder}", *settings, *sizes])
    with init_distributed() as dist:
        torch.manual_seed(0)
        teacher = load(folder, dist.device)
        prompts = open_prompts(recipe.prompts).texts("train")[:64]
        sources = DMD.batch_sources(DataSetup(recipe, teacher, prompts, Path(out).parent / "cache"))
        models = build_models(recipe, teacher, recipe.method.extra_models(), dist)
        method = DMD.build(MethodSetup(recipe, models, teacher.encode([""]), sources, prompts, dist))
        states = [TrainState(part, recipe.optim[part.name], recipe.train, dist) for part in method.trainables]
        with Received() as received:
            for state in states:
                for update in range(state.trainable.updates_per_step):
                    state.update([sources["train"](update, dist.shard)], 1)
        student, fake = states
        found = {
            "teacher": held(teacher.denoiser.parameters()),
            "student": held(student.weights.values()),
            "fake score": held(fake.weights.values()),
            "gradients": held(p.grad for p in fake.weights.values() if p.grad is not None),
            "AdamW": held(v for one in states for s in one.optimizer.state.values() for v in s.values()),
            "EMA": held(student.ema.weights.values()) if student.ema else 0,
            "weights received": received.weights,
            "gradients received": received.gradients,
        }
        if dist.is_main_process:
            Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
