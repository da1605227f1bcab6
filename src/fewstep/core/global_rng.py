"""Random draws of one process among several, equal to those that one process makes for the whole batch.

On every process the generators have the same state. Inside ``GlobalBatchRNG`` a draw with one row per sample is made
for the whole global batch, and the process keeps its own rows; a draw without dimensions is the same everywhere. Any
other random function is refused, since its values cannot be assigned to samples.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fewstep.core.method import Shard
from fewstep.errors import UserError

_shared = ContextVar("shared_draws", default=False)


@contextmanager
def shared_draws() -> Iterator[None]:
    """Inside, draws of any shape are the same on every process: they do not belong to samples."""
    token = _shared.set(True)
    try:
        yield
    finally:
        _shared.reset(token)


class GlobalBatchRNG(TorchFunctionMode):
    """Inside, ``torch.randn``, ``rand``, ``randint`` and their ``_like`` forms give this process's rows of a draw for
    the whole batch. Draws from an explicit ``generator`` are left as they are.

    Raises:
        UserError: another random function is called.
    """

    def __init__(self, shard: Shard) -> None:
        super().__init__()
        self.shard = shard

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if _shared.get() or kwargs.get("generator") is not None:
            return func(*args, **kwargs)
        if func in _SIZED:
            return self._draw_sized(func, args, kwargs)
        if func in _LIKE:
            return self._draw_like(func, args, kwargs)
        if func in _REFUSED or (func in _WITH_DROPOUT and _drops_out(func, args, kwargs)):
            raise UserError(
                f"{func.__name__} inside a loss: on several processes only torch.randn, rand, randint and their _like "
                "forms are drawn per sample; use one of them, a generator, or core.global_rng.shared_draws"
            )
        return func(*args, **kwargs)

    def _draw_sized(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        bounds, size = _split_size(func, args, kwargs.pop("size", None))
        if not size:
            return func(*bounds, size=(), **kwargs)
        if kwargs.get("out") is not None:
            raise UserError(f"torch.{func.__name__}(out=...) inside a loss: leave out= away on several processes")
        rows, *rest = size
        drawn: Tensor = func(*bounds, size=(rows * self.shard.world_size, *rest), **kwargs)
        return self._own_rows(drawn, rows)

    def _draw_like(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        like, *bounds = args
        if not like.ndim:
            return func(like, *bounds, **kwargs)
        return self._own_rows(func(_with_all_rows(like, self.shard.world_size), *bounds, **kwargs), len(like))

    def _own_rows(self, drawn: Tensor, count: int) -> Tensor:
        return drawn[self.shard.rank * count : (self.shard.rank + 1) * count].clone()  # frees the other rows


def _split_size(func: Any, args: Sequence[Any], size: Sequence[int] | None) -> tuple[list[Any], tuple[int, ...]]:
    """The arguments before the size, and the size, of ``rand(2, 3)``, ``rand((2, 3))`` or ``randint(0, 9, (2, 3))``."""
    if size is not None:
        return list(args), tuple(size)
    if args and not isinstance(args[-1], int):
        return list(args[:-1]), tuple(args[-1])
    return ([], tuple(args)) if func is not torch.randint else (list(args), ())


def _with_all_rows(like: Tensor, factor: int) -> Tensor:
    """An empty tensor with ``factor`` times the rows of ``like``, and its order of dimensions in memory: that is the
    order in which ``_like`` functions draw."""
    order = sorted(range(like.ndim), key=like.stride, reverse=True)
    if like.is_contiguous():
        order = list(range(like.ndim))
    sizes = [like.shape[d] * (factor if d == 0 else 1) for d in order]
    inverse = [order.index(d) for d in range(like.ndim)]
    return torch.empty(sizes, dtype=like.dtype, device=like.device).permute(inverse)


_SIZED = {torch.randn, torch.rand, torch.randint}
_LIKE = {torch.randn_like, torch.rand_like, torch.randint_like}

_RECURRENT = {torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu}

#: Random only with a positive dropout probability; the name of its argument, and of the one that switches it on.
_WITH_DROPOUT: dict[Any, tuple[str, str | None]] = {
    **dict.fromkeys((F.dropout, F.dropout1d, F.dropout2d, F.dropout3d), ("p", "training")),
    **dict.fromkeys((F.alpha_dropout, F.feature_alpha_dropout), ("p", "training")),
    F.scaled_dot_product_attention: ("dropout_p", None),
    F.multi_head_attention_forward: ("dropout_p", "training"),
    **dict.fromkeys(_RECURRENT, ("dropout", "train")),
}


def _drops_out(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    probability, switch = _WITH_DROPOUT[func]
    if func in _RECURRENT:  # builtins: ..., num_layers, dropout, train, ...
        at = next(i for i, value in enumerate(args) if isinstance(value, float))
        return bool(args[at] > 0 and args[at + 1])
    if func is F.scaled_dot_product_attention:  # a builtin without a signature: query, key, value, mask, dropout_p
        return float(kwargs.get(probability, args[4] if len(args) > 4 else 0.0)) > 0
    bound = inspect.signature(func).bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments[probability] > 0 and (switch is None or bound.arguments[switch])


def _named(owner: Any, names: str) -> set[Callable[..., Any]]:
    return {found for name in names.split() if (found := getattr(owner, name, None)) is not None}


_REFUSED: set[Any] = (
    _named(
        torch,
        "normal bernoulli bernoulli_ multinomial poisson binomial randperm dropout dropout_ native_dropout "
        "alpha_dropout alpha_dropout_ feature_dropout feature_dropout_ feature_alpha_dropout feature_alpha_dropout_ "
        "rrelu rrelu_ _standard_gamma _sample_dirichlet",
    )
    | _named(
        Tensor,
        "normal_ uniform_ random_ bernoulli bernoulli_ exponential_ cauchy_ log_normal_ geometric_ multinomial",
    )
    | _named(F, "rrelu rrelu_ gumbel_softmax fractional_max_pool2d fractional_max_pool3d")
    | _named(F, "fractional_max_pool2d_with_indices fractional_max_pool3d_with_indices")
    | _named(
        nn.init,
        "uniform_ normal_ trunc_normal_ xavier_uniform_ xavier_normal_ kaiming_uniform_ kaiming_normal_ orthogonal_ "
        "sparse_",
    )
)
