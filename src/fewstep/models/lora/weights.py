"""What an adapter adds to one weight matrix: LoRA, LoKr, and DoRA's magnitude on either."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """``scale * up @ down`` (LoRA, arXiv 2106.09685).

    Attributes:
        down: [rank, in], fp32.
        up: [out, rank], fp32.
        scale: alpha / rank.
    """

    down: Tensor
    up: Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int:
        return len(self.down)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.down, self.up

    @property
    def shape(self) -> tuple[int, int]:
        return self.up.shape[0], self.down.shape[1]

    def delta(self) -> Tensor:
        """[out, in]."""
        return self.scale * (self.up @ self.down)

    def norm(self) -> float:
        """The Frobenius norm of ``delta()``."""
        gram = (self.up.double().T @ self.up.double()) * (self.down.double() @ self.down.double().T)
        return abs(self.scale) * max(float(gram.sum()), 0.0) ** 0.5

    def split(self, sizes: Sequence[int]) -> list[LowRank]:
        """Parts of so many rows, as a fused layer's own layers have them; without the components that are zero in a
        part, which a block-diagonal ``up`` has."""
        parts = []
        for rows in self.up.split(list(sizes)):
            used = rows.any(dim=0)
            parts.append(LowRank(self.down[used], rows[:, used].clone(), self.scale))
        return parts


@dataclass(frozen=True)
class Kronecker:
    """``scale * kron(left, right)`` (LoKr, arXiv 2309.14859).

    Attributes:
        left, right: a matrix, or two whose product it is; fp32.
    """

    left: tuple[Tensor, ...]
    right: tuple[Tensor, ...]
    scale: float = 1.0

    @property
    def rank(self) -> int | None:
        """Of the factor that is a product; None if neither is."""
        pair = next((factor for factor in (self.right, self.left) if len(factor) == 2), None)
        return None if pair is None else pair[1].shape[0]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return *self.left, *self.right

    @property
    def shape(self) -> tuple[int, int]:
        return self.left[0].shape[0] * self.right[0].shape[0], self.left[-1].shape[1] * self.right[-1].shape[1]

    def delta(self) -> Tensor:
        """[out, in]."""
        left, right = (reduce(torch.matmul, factors) for factors in (self.left, self.right))
        return self.scale * torch.kron(left, right)

    def norm(self) -> float:
        """The Frobenius norm of ``delta()``."""
        left, right = (reduce(torch.matmul, factors) for factors in (self.left, self.right))
        return abs(self.scale) * float(left.norm() * right.norm())

    def split(self, sizes: Sequence[int]) -> Sequence[Kronecker | Rows]:
        """Parts of so many rows: products of the same kind where the left factor divides, else views."""
        block = self.right[0].shape[0]
        if any(size % block for size in sizes):
            return [Rows(self, end - size, end) for size, end in zip(sizes, accumulate(sizes), strict=True)]
        rows = self.left[0].split([size // block for size in sizes])
        return [Kronecker((part.clone(), *self.left[1:]), self.right, self.scale) for part in rows]


@dataclass(frozen=True)
class Rows:
    """The rows ``start`` to ``end`` of a Kronecker product; they are no such product themselves."""

    whole: Kronecker
    start: int
    end: int

    @property
    def rank(self) -> int | None:
        return self.whole.rank

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.whole.tensors

    @property
    def shape(self) -> tuple[int, int]:
        return self.end - self.start, self.whole.shape[1]

    def delta(self) -> Tensor:
        """[out, in]."""
        return self.whole.delta()[self.start : self.end]

    def norm(self) -> float:
        """The Frobenius norm of ``delta()``."""
        return float(self.delta().norm())


Change = LowRank | Kronecker | Rows


@dataclass(frozen=True)
class Update:
    """What an adapter does to one layer.

    Attributes:
        magnitude: DoRA's (arXiv 2402.09353): the norms that the changed weight's rows, [out, 1], or columns, [1, in],
            are given. None: plain addition.
    """

    change: Change
    magnitude: Tensor | None = None

    def delta(self, weight: Tensor) -> Tensor:
        """What is added to ``weight`` [out, in] at strength 1, in fp32 on its device."""
        change = self.change.delta().to(weight.device)
        if self.magnitude is None:
            return change
        base, magnitude = weight.float(), self.magnitude.to(weight.device)
        changed = base + change
        norm = changed.norm(dim=1 if magnitude.shape[1] == 1 else 0, keepdim=True)
        return changed * (magnitude / norm.clamp(min=torch.finfo(torch.float32).tiny)) - base


@dataclass(frozen=True)
class Lora:
    """An adapter that is bound to a transformer.

    Attributes:
        file: where it was read from.
        updates: by the diffusers name of the linear layer.
        modules: modules in the file; fewer than updates where a fused layer is several layers here.
        metadata: of the file's header, and of a PEFT configuration.
        dtype: the widest in the file.
    """

    file: Path
    updates: Mapping[str, Update]
    modules: int
    metadata: Mapping[str, str] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32

    @property
    def ranks(self) -> list[int]:
        """The different ranks of its layers, ascending."""
        return sorted({update.change.rank for update in self.updates.values() if update.change.rank is not None})

    @property
    def nbytes(self) -> int:
        """Memory of its tensors; layers may share some."""
        magnitudes = [update.magnitude for update in self.updates.values() if update.magnitude is not None]
        changes = [tensor for update in self.updates.values() for tensor in update.change.tensors]
        return sum({id(tensor): tensor.nbytes for tensor in (*changes, *magnitudes)}.values())
