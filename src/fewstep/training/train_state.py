"""A trainable part with its optimizer, EMA and counters."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fewstep.config.sections import OptimSettings, TrainSettings
from fewstep.core.dtensor import full_tensor
from fewstep.core.method import Batch, Trainable
from fewstep.core.precision import uses_bf16
from fewstep.errors import UserError
from fewstep.progress import log_line
from fewstep.training.checkpoint import Checkpoint
from fewstep.training.distributed import DistContext
from fewstep.training.ema import EMA
from fewstep.training.optim import (
    check_optimizer,
    init_optimizer_state,
    learning_rate,
    make_optimizer,
    set_lr,
    tensor_leaves,
)

# After so many nonfinite updates in a row the training has diverged.
MAX_NONFINITE_SKIPS = 20


class TrainState:
    """A trainable with its optimizer, learning rate, gradient clipping and EMA."""

    def __init__(
        self, trainable: Trainable, optim: OptimSettings, train: TrainSettings, dist: DistContext | None = None
    ) -> None:
        self.trainable, self.optim, self.train = trainable, optim, train
        self.dist = dist or DistContext()
        # the trained parameters by name, in the optimizer's order
        self.weights = {name: p for name, p in trainable.module.named_parameters() if p.requires_grad}
        check_optimizer(trainable.name, optim, self.dist.world_size)
        if optim.warmup_steps > train.steps and self.dist.is_main_process:
            log_line(
                f"optim.{trainable.name}.warmup_steps {optim.warmup_steps}: longer than the training, whose last step "
                f"has {train.steps / optim.warmup_steps:.0%} of the learning rate"
            )
        self.optimizer = make_optimizer(self.weights, optim)
        self.ema = EMA(trainable.module, optim.ema_decay) if optim.ema_decay is not None else None
        self.device = next(trainable.module.parameters()).device
        self.bf16 = uses_bf16(train.precision, self.device)
        self.counters = {"updates": 0, "nonfinite_skips": 0, "nonfinite_skips_in_a_row": 0}

    @property
    def name(self) -> str:
        return self.trainable.name

    @property
    def module(self) -> nn.Module:
        return self.trainable.module

    @contextmanager
    def loss_context(self) -> Iterator[None]:
        """Inside, operations use the precision of losses, and random draws are those of the global batch."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16), self.dist.global_rng():
            yield

    def update(self, batches: Sequence[Batch], step: int) -> dict[str, float]:
        """One update with the mean of the batches' gradients; skipped and counted if the loss or gradient is nonfinite.

        Returns the metrics, means over the batches.
        """
        rate = learning_rate(self.optim, step, self.train.steps)
        set_lr(self.optimizer, rate)
        found: dict[str, list[float]] = {}
        for batch in batches:
            with self.loss_context():
                loss, metrics = self.trainable.loss(batch)
            (loss / len(batches)).backward()
            for key, value in {"loss": loss, **metrics}.items():
                found.setdefault(key, []).append(float(value.detach()))
        self.dist.sync_unsharded_grads(self.weights.values())
        means = self.dist.all_reduce_mean({key: sum(values) / len(values) for key, values in found.items()})
        clip = self.optim.max_grad_norm if self.optim.max_grad_norm is not None else float("inf")
        norm = float(full_tensor(nn.utils.clip_grad_norm_(self.weights.values(), clip)))
        if not math.isfinite(means["loss"] + norm):
            return self._skip()
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update(self.counters["updates"])
        self.counters["updates"] += 1
        self.counters["nonfinite_skips_in_a_row"] = 0
        return means | {"grad_norm": norm, "lr": rate, "nonfinite_skips": 0.0}

    def _skip(self) -> dict[str, float]:
        self.counters["nonfinite_skips"] += 1
        self.counters["nonfinite_skips_in_a_row"] += 1
        if self.counters["nonfinite_skips_in_a_row"] >= MAX_NONFINITE_SKIPS:
            raise UserError(
                f"{self.name}: {MAX_NONFINITE_SKIPS} updates in a row had a loss or gradient that is not finite; start "
                f"over (--overwrite) with a lower optim.{self.name}.lr, more warmup_steps, or train.precision=fp32"
            )
        return {"nonfinite_skips": 1.0}

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """The tensors of a checkpoint: trainable weights and buffers, EMA, optimizer; sharded where the module is."""
        trained = self.weights.keys() | {name for name, _ in self.module.named_buffers()}
        weights = {name: tensor for name, tensor in self.module.state_dict().items() if name in trained}
        moments = {
            f"{name}/{key}{part}": tensor
            for name, p in self.weights.items()
            for key, value in self.optimizer.state.get(p, {}).items()
            for part, tensor in tensor_leaves(value).items()
        }
        return {"weights": weights, "optimizer": moments} | ({"ema": self.ema.weights} if self.ema else {})

    def restore(self, found: Checkpoint, counters: dict[str, int]) -> None:
        """Restores what `tensors` returned. Raises: RuntimeError if names or shapes differ."""
        if found.shapes(f"{self.name}.optimizer") and not self.optimizer.state:
            init_optimizer_state(self.optimizer)
        live = self.tensors()
        for part in ("weights", "ema", "optimizer"):
            found.load_into(f"{self.name}.{part}", live.get(part, {}))
        self.counters = counters
