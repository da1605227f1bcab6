"""What quantization changes: relative errors of written tensors against their bf16 values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as it was written.

    Attributes:
        name: in the file.
        format: "bf16", "fp8", "q8_0", ...
        numbers, bytes: of it, and in the file.
        squared_error, squared_norm: sums over its numbers; of the difference from bf16, and of bf16.
    """

    name: str
    format: str
    numbers: int
    bytes: int
    squared_error: float
    squared_norm: float

    @classmethod
    def measure(cls, name: str, format: str, size: int, stored: Tensor, tensor: Tensor) -> StoredTensor:
        """Of a tensor and its values as they are read back; both in any dtype."""
        reference = tensor.bfloat16().float()
        error = (stored.float() - reference).norm()
        return cls(name, format, tensor.numel(), size, float(error) ** 2, float(reference.norm()) ** 2)

    @property
    def relative_rms(self) -> float:
        """Root mean square of the error over that of bf16."""
        return relative_rms([self])


def relative_rms(tensors: Sequence[StoredTensor]) -> float:
    """Root mean square of the error of all tensors together, over that of their bf16 values; 0 of none."""
    norm = sum(each.squared_norm for each in tensors)
    return math.sqrt(sum(each.squared_error for each in tensors) / norm) if norm else 0.0


@dataclass(frozen=True)
class ExportedComponent:
    """One component of an exported model.

    Attributes:
        component: "transformer", "text_encoder" or "vae".
        file: its path in the exported folder.
        tensors: in the order of the file.
    """

    component: str
    file: str
    tensors: Sequence[StoredTensor]

    @property
    def bytes(self) -> int:
        """Of all tensors."""
        return sum(each.bytes for each in self.tensors)

    @property
    def relative_rms(self) -> float:
        """Of all tensors together."""
        return relative_rms(self.tensors)

    @property
    def worst(self) -> StoredTensor:
        """The tensor with the largest relative error."""
        return max(self.tensors, key=lambda each: each.relative_rms)

    @property
    def formats(self) -> dict[str, list[StoredTensor]]:
        """The tensors by format, those with the most numbers first."""
        groups: dict[str, list[StoredTensor]] = {}
        for each in self.tensors:
            groups.setdefault(each.format, []).append(each)
        return dict(sorted(groups.items(), key=lambda item: -sum(each.numbers for each in item[1])))

    def as_dict(self) -> dict[str, Any]:
        """For JSON: totals, then every tensor."""
        return {
            "component": self.component,
            "file": self.file,
            "bytes": self.bytes,
            "relative_rms": self.relative_rms,
            "worst": {"name": self.worst.name, "relative_rms": self.worst.relative_rms},
            "formats": {
                name: {"numbers": sum(each.numbers for each in group), "relative_rms": relative_rms(group)}
                for name, group in self.formats.items()
            },
            "tensors": {each.name: {"format": each.format, "relative_rms": each.relative_rms} for each in self.tensors},
        }
