"""Reuse of a transformer's layers between sampling steps: what they add to the tokens changes slowly.

diffusers' hooks (``apply_first_block_cache`` and others) decide for a whole batch at once: an image would depend on the
batch it is drawn in. Here each sample decides for itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

CacheMethod = Literal["first-block", "interval", "taylor"]
CACHE_METHODS: tuple[CacheMethod, ...] = get_args(CacheMethod)
_DEFAULTS: dict[CacheMethod, float] = {"first-block": 0.1, "interval": 2.0, "taylor": 2.0}

#: ``run(tokens, layers, rows)``: tokens [R, L, D] after the layers of a slice; R rows of the batch, None is all.
RunLayers = Callable[[Tensor, slice, Tensor | None], Tensor]


@dataclass(frozen=True)
class CacheSettings:
    """How layers are reused.

    Attributes:
        method: "first-block": run the first layer, and the others only where its residual has changed by more than
            ``value``, relative to its own mean absolute value, since they last ran (TeaCache, arXiv 2411.19108, as in
            ParaAttention's First Block Cache); "interval": run all layers at every ``value``-th step and reuse their
            residual in between (FORA, arXiv 2407.01425); "taylor": as "interval", with the residual continued linearly
            in sigma from the last two (TaylorSeer, arXiv 2503.06923, first order).
    """

    method: CacheMethod
    value: float

    @classmethod
    def parse(cls, text: str) -> CacheSettings:
        """METHOD or METHOD:VALUE. Raises: ValueError, a sentence."""
        name, colon, number = text.partition(":")
        if name not in CACHE_METHODS:
            raise ValueError(f"{name!r} is not a method; take one of: {', '.join(CACHE_METHODS)}")
        try:
            value = float(number) if colon else _DEFAULTS[name]
        except ValueError:
            raise ValueError(f"{number!r} is not a number") from None
        if name == "first-block" and not 0 < value < math.inf:
            raise ValueError(f"the threshold of first-block must be positive, not {number}")
        if name != "first-block" and not (value >= 2 and value.is_integer()):
            raise ValueError(f"the interval of {name} must be a whole number of steps, at least 2, not {number}")
        return cls(name, value)


@dataclass
class _State:
    """Of one batch of prompts."""

    step: int = 0
    first: Tensor | None = None  # residual of the first layer when the others last ran
    residual: Tensor | None = None  # of the layers that are reused
    sigma: Tensor | None = None  # [B], where that was
    slope: Tensor | None = None  # change of the residual with sigma


@dataclass
class LayerCache:
    """The state of one sampling: at most three tensors of the size of the tokens for each batch of prompts."""

    settings: CacheSettings
    _states: dict[Hashable, _State] = field(default_factory=dict)

    def __call__(self, key: Hashable, tokens: Tensor, sigma: Tensor, run: RunLayers) -> Tensor:
        """Tokens [B, L, D] after all layers, some of them from an earlier call with this key.

        Args:
            key: of the samples, which must be the same at each step.
            sigma: [B].
        """
        state = self._states.setdefault(key, _State())
        if self.settings.method == "first-block":
            tokens = self._first_block(state, tokens, run)
        else:
            tokens = self._interval(state, tokens, sigma, run)
        state.step += 1
        return tokens

    def _first_block(self, state: _State, tokens: Tensor, run: RunLayers) -> Tensor:
        after = run(tokens, slice(0, 1), None)
        first = after - tokens
        if state.first is None or state.residual is None:
            done = run(after, slice(1, None), None)
            state.first, state.residual = first, done - after
            return done
        change = (first - state.first).abs().flatten(1).mean(dim=1) / state.first.abs().flatten(1).mean(dim=1)
        rows = (change <= self.settings.value).logical_not().nonzero().flatten()  # of 0 / 0 too
        result = after + state.residual
        if len(rows):
            done = run(after[rows], slice(1, None), rows)
            state.first[rows], state.residual[rows], result[rows] = first[rows], done - after[rows], done
        return result

    def _interval(self, state: _State, tokens: Tensor, sigma: Tensor, run: RunLayers) -> Tensor:
        # a slope needs two steps next to each other: those at the start, where images change most
        due = state.step % int(self.settings.value) == 0 or (self.settings.method == "taylor" and state.step == 1)
        if due or state.residual is None or state.sigma is None:
            after = run(tokens, slice(None), None)
            residual = after - tokens
            if state.residual is not None and state.sigma is not None:
                state.slope = (residual - state.residual) / (sigma - state.sigma)[:, None, None].to(residual.dtype)
            state.residual, state.sigma = residual, sigma
            return after
        if self.settings.method == "taylor" and state.slope is not None:
            distance = (sigma - state.sigma)[:, None, None].to(state.slope.dtype)
            return tokens + torch.addcmul(state.residual, state.slope, distance)
        return tokens + state.residual
