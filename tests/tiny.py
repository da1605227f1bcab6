"""A training of a few milliseconds per step, for the tests of the trainer; also a program that tests interrupt."""

import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from fewstep.config.sections import OptimSettings
from fewstep.core.method import Batch, Method, Shard, Trainable
from fewstep.emoji.recipes import ClassifierRecipe
from fewstep.training.run_dir import RunDir
from fewstep.training.trainer import Trainer


class TinyMethod(Method):
    """Two linear trainables; the second is trained towards the first. Dropout and noise use the global generator."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.first = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.2), nn.BatchNorm1d(4), nn.Linear(4, 3))
        self.first[3].bias.requires_grad_(False)
        self.second = nn.Linear(3, 3)
        self.trainables = [
            Trainable("first", self.first, self.first_loss),
            Trainable("second", self.second, self.second_loss, 2),
        ]
        self.pause = 0.0

    def first_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        noisy = batch + 0.1 * torch.randn_like(batch)
        loss = (self.first(noisy) - batch).square().mean()
        return loss, {"double": 2 * loss}

    def second_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return (self.second(batch) - self.first(batch).detach()).square().mean(), {}

    def after_step(self, step: int) -> dict[str, float]:
        time.sleep(self.pause)
        return {"steps": float(step)}


class CollectingMethod(TinyMethod):
    """Both trainables use what is collected; the second in two inner epochs. A running mean is the method's state."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = torch.zeros(3)
        for part in self.trainables:
            part.uses_collected = True

    def collect(self, batch: Batch) -> Tensor:
        noisy = batch + torch.randn_like(batch)
        self.mean = 0.9 * self.mean + 0.1 * noisy.mean(dim=0)
        return noisy - self.mean

    def state_dict(self) -> dict[str, Tensor]:
        return {"mean": self.mean}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.mean = state["mean"].clone()


def tiny_source(position: int, shard: Shard) -> Tensor:
    return torch.randn(8, 3, generator=torch.Generator().manual_seed(position))[shard.rows(8)]


def tiny_recipe(**train: object) -> ClassifierRecipe:
    settings = {"steps": 12, "batch_size": 8, "log_every": 4, "save_every": 5, **train}
    return ClassifierRecipe.model_validate(
        {"kind": "classifier", "name": "tiny", "optim": {"lr": 0.01}, "train": settings}
    )


def tiny_trainer(directory: Path, overwrite: bool = False, method: Method | None = None, **train: object) -> Trainer:
    recipe = tiny_recipe(**train)
    optim = {
        "first": OptimSettings(lr=0.01, ema_decay=0.9, warmup_steps=3, lr_schedule="cosine", weight_decay=0.01),
        "second": OptimSettings(lr=0.02),
    }
    run = RunDir(directory, recipe, overwrite=overwrite, resume_command="the same command")
    return Trainer(TinyMethod() if method is None else method, tiny_source, run, train=recipe.train, optim=optim)


def fit(trainer: Trainer) -> Trainer:
    """Trains, and unlocks the directory as the end of a process does."""
    with trainer.run:
        trainer.fit()
    return trainer


def everything(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Weights, EMA, moments, the method's state and the random state, by name."""
    tensors = {"random": torch.get_rng_state()}
    tensors |= {f"method.{name}": tensor.clone() for name, tensor in trainer.method.state_dict().items()}
    for state in trainer.train_states:
        for part, named in state.tensors().items():
            tensors |= {f"{state.name}.{part}.{name}": tensor.clone() for name, tensor in named.items()}
    return tensors


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different


if __name__ == "__main__":
    torch.set_num_threads(1)
    trainer = tiny_trainer(Path(sys.argv[1]), steps=int(sys.argv[2]), save_every=1000, log_every=1)
    trainer.method.pause = float(sys.argv[3])
    try:
        fit(trainer)
    except KeyboardInterrupt as stop:
        print(stop, file=sys.stderr)
        sys.exit(130)
