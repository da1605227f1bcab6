"""Low-rank adapters by singular value decomposition: of the difference of two models, and of other adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from fewstep.errors import UserError
from fewstep.models.components import format_tensor_names, resolve_model
from fewstep.models.lora.targets import LoraTargets
from fewstep.models.lora.weights import Change, LowRank, Update
from fewstep.models.step_adapters import check_one_transformer
from fewstep.models.weight_files import weight_files

_WHOLE = (
    1024  # largest side of a matrix that is decomposed whole; of larger ones the leading part, by random projection
)
_OVERSAMPLING, _POWER_ITERATIONS = 16, 4
_ROUNDING = 1e-6  # of the energy

#: Called with the energy that a layer keeps.
Report = Callable[[str, "Kept"], None]


@dataclass(frozen=True)
class Kept:
    """What a truncation keeps of a matrix.

    Attributes:
        rank: of the result.
        energy: its sum of squared singular values.
        total: that of the matrix.
    """

    rank: int
    energy: float
    total: float


def choose_rank(values: Tensor, total: float, energy: float, max_rank: int) -> int:
    """The least rank whose leading singular values [N], descending, have at least the fraction ``energy`` of ``total``,
    the sum of all squares; at most ``max_rank`` or N, at least 1."""
    reached = values.double().square().cumsum(0) >= energy * total * (1 - _ROUNDING)
    needed = int(reached.int().argmax()) + 1 if bool(reached.any()) else len(values)
    return max(1, min(needed, max_rank, len(values)))


def truncate(matrix: Tensor, energy: float, max_rank: int) -> tuple[LowRank, Kept]:
    """The best approximation of a matrix [out, in] of a rank (Eckart and Young, 1936), with its singular values shared
    equally by ``up`` and ``down``; computed on the matrix's device, returned on the CPU."""
    matrix = matrix.float()
    total = float(torch.linalg.vector_norm(matrix)) ** 2
    if min(matrix.shape) <= _WHOLE:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    else:
        rank = min(max_rank + _OVERSAMPLING, *matrix.shape)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            left, values, right = torch.svd_lowrank(matrix, rank, niter=_POWER_ITERATIONS)
        right = right.T
    return _truncated(left, values, right, total, energy, max_rank)


def truncate_low_rank(change: LowRank, energy: float, max_rank: int) -> tuple[LowRank, Kept]:
    """:func:`truncate` of ``scale * up @ down``, through the QR decompositions of both, without the whole matrix."""
    outer, small_up = torch.linalg.qr(change.up)
    inner, small_down = torch.linalg.qr(change.down.T)
    left, values, right = torch.linalg.svd(change.scale * small_up @ small_down.T)
    total = float(values.double().square().sum())
    return _truncated(outer @ left, values, right @ inner.T, total, energy, max_rank)


def _truncated(
    left: Tensor, values: Tensor, right: Tensor, total: float, energy: float, max_rank: int
) -> tuple[LowRank, Kept]:
    rank = choose_rank(values, total, energy, max_rank)
    left, values, right = left.cpu(), values.cpu(), right.cpu()
    root = values[:rank].sqrt()
    kept = Kept(rank, min(float(values[:rank].double().square().sum()), total), total)
    return LowRank(root[:, None] * right[:rank], left[:, :rank] * root), kept


def resize(update: Update, energy: float, max_rank: int, device: torch.device | str = "cpu") -> tuple[Update, Kept]:
    """An update as LoRA of another rank; DoRA's magnitude is kept."""
    change: Change = update.change
    if isinstance(change, LowRank):
        smaller, kept = truncate_low_rank(change, energy, max_rank)
    else:
        smaller, kept = truncate(change.delta().to(device), energy, max_rank)
    return Update(smaller, update.magnitude), kept


def differences(
    base: str | Path, tuned: str | Path, targets: LoraTargets, unadapted: list[str]
) -> Iterator[tuple[str, Tensor]]:
    """The linear layers whose weights differ between two models, each with tuned minus base in fp32, read one by one.

    Args:
        unadapted: is filled with the names of other tensors that differ, which no LoRA can hold.

    Raises:
        UserError: the transformers have different tensors.
    """
    folders = [resolve_model(model) for model in (base, tuned)]
    for folder in folders:
        check_one_transformer(folder, "extract")
    ones, others = (_Weights(folder / "transformer") for folder in folders)
    if missing := sorted(ones.files.keys() ^ others.files.keys()):
        raise UserError(f"{tuned}: another architecture than {base}: {format_tensor_names('different', missing)}")
    with ones, others:
        for name in sorted(ones.files):
            one, other = ones.read(name), others.read(name)
            if one.shape != other.shape:
                raise UserError(f"{tuned}: {name} is {list(other.shape)}, in {base} it is {list(one.shape)}")
            if torch.equal(one.float(), other.float()):
                continue
            layer = name.removesuffix(".weight")
            if layer in targets.shapes and name.endswith(".weight"):
                yield layer, other.float() - one.float()
            else:
                unadapted.append(name)


class _Weights:
    """The tensors of a component's files, read when they are needed."""

    def __init__(self, folder: Path) -> None:
        self.files: dict[str, Path] = {}
        for file in weight_files(folder):
            with safe_open(file, "pt") as tensors:
                self.files |= dict.fromkeys(tensors.keys(), file)

    def __enter__(self) -> None:
        self._stack = ExitStack()
        self._open = {file: self._stack.enter_context(safe_open(file, "pt")) for file in set(self.files.values())}

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def read(self, name: str) -> Tensor:
        tensor: Tensor = self._open[self.files[name]].get_tensor(name)
        return tensor


def kept_energy(kept: Mapping[str, Kept]) -> float:
    """The fraction of the energy of all layers that is kept; 1 if there is none."""
    total = sum(each.total for each in kept.values())
    return sum(each.energy for each in kept.values()) / total if total else 1.0
