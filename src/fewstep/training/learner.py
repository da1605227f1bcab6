"""One player as the trainer sees it."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.recipes.settings import OptimSettings, TrainSettings
from fewstep.training.checkpoint import Checkpoint
from fewstep.training.distribution import Ranks, whole
from fewstep.training.ema import Ema
from fewstep.training.method import Batch, Player
from fewstep.training.optim import learning_rate, make_optimizer, make_state, parts, set_rate
from fewstep.training.precision import uses_bf16

# After so many useless updates in a row the training has diverged, and more of them will not help.
MAX_SKIPPED = 20


class Learner:
    """A player with all it takes to move it: optimizer, learning rate, clipping, EMA."""

    def __init__(self, player: Player, optim: OptimSettings, train: TrainSettings, ranks: Ranks | None = None) -> None:
        self.player, self.optim, self.train = player, optim, train
        self.ranks = ranks or Ranks()
        # The parameters that move, by name, in the optimizer's order.
        self.weights = {name: p for name, p in player.module.named_parameters() if p.requires_grad}
        if optim.bits == 8 and self.ranks.world > 1:
            raise UserError(f"optim.{player.name}.bits 8: with one process only; several share the moments as they are")
        self.optimizer = make_optimizer(list(self.weights.values()), optim)
        self.ema = Ema(player.module, optim.ema) if optim.ema is not None else None
        self.device = next(player.module.parameters()).device
        self.bf16 = uses_bf16(train.precision, self.device)
        self.counters = {"updates": 0, "skipped": 0, "skipped_in_a_row": 0}

    @property
    def name(self) -> str:
        return self.player.name

    @property
    def module(self) -> nn.Module:
        return self.player.module

    def update(self, batches: Sequence[Batch], step: int) -> dict[str, float]:
        """One update by the mean of the batches' gradients; skipped, and only counted, if its loss or gradient is not
        finite. Returns the metrics, means over the batches."""
        rate = learning_rate(self.optim, step, self.train.steps)
        set_rate(self.optimizer, rate)
        found: dict[str, list[float]] = {}
        for batch in batches:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16), self.ranks.random():
                loss, metrics = self.player.loss(batch)
            (loss / len(batches)).backward()
            for key, value in {"loss": loss, **metrics}.items():
                found.setdefault(key, []).append(float(value.detach()))
        self.ranks.average_gradients(self.weights.values())
        means = self.ranks.mean({key: sum(values) / len(values) for key, values in found.items()})
        clip = self.optim.grad_clip if self.optim.grad_clip is not None else float("inf")
        norm = float(whole(nn.utils.clip_grad_norm_(self.weights.values(), clip)))
        if not math.isfinite(means["loss"] + norm):
            return self._skip()
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update(self.counters["updates"])
        self.counters["updates"] += 1
        self.counters["skipped_in_a_row"] = 0
        return means | {"grad_norm": norm, "lr": rate, "skipped": 0.0}

    def _skip(self) -> dict[str, float]:
        self.counters["skipped"] += 1
        self.counters["skipped_in_a_row"] += 1
        if self.counters["skipped_in_a_row"] >= MAX_SKIPPED:
            raise UserError(
                f"{self.name}: {MAX_SKIPPED} updates in a row had a loss or gradient that is not finite; start over "
                "(--fresh) with a lower learning rate, more warm-up, or precision fp32"
            )
        return {"skipped": 1.0}

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint needs: trainable weights and buffers, EMA, optimizer; sharded where the module is."""
        moving = self.weights.keys() | {name for name, _ in self.module.named_buffers()}
        weights = {name: tensor for name, tensor in self.module.state_dict().items() if name in moving}
        moments = {
            f"{name}/{key}{part}": tensor
            for name, p in self.weights.items()
            for key, value in self.optimizer.state.get(p, {}).items()
            for part, tensor in parts(value).items()
        }
        return {"weights": weights, "optimizer": moments} | ({"ema": self.ema.weights} if self.ema else {})

    def restore(self, found: Checkpoint, counters: dict[str, int]) -> None:
        """Puts back what `tensors` gave. Raises: RuntimeError if names or shapes differ."""
        if found.shapes(f"{self.name}.optimizer") and not self.optimizer.state:
            make_state(self.optimizer)
        live = self.tensors()
        for part in ("weights", "ema", "optimizer"):
            found.fill(f"{self.name}.{part}", live.get(part, {}))
        self.counters = counters
