"""GPUs, by name or size."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fewstep.errors import UserError


@dataclass(frozen=True)
class GPUSpec:
    """bytes: memory. flops: dense bf16 matrix products a second by the maker's specification; 0 if unknown."""

    bytes: float
    flops: float


GPUS = {
    "rtx3090": GPUSpec(24e9, 71e12),
    "rtx4090": GPUSpec(24e9, 165e12),
    "rtx5090": GPUSpec(32e9, 210e12),
    "l40s": GPUSpec(48e9, 362e12),
    "a100-40": GPUSpec(40e9, 312e12),
    "a100-80": GPUSpec(80e9, 312e12),
    "h100": GPUSpec(80e9, 989e12),
    "h200": GPUSpec(141e9, 989e12),
    "b200": GPUSpec(192e9, 2250e12),
}

ASSUMED_MFU = 0.4  # model FLOPs utilization behind the printed times: an assumption, not a measurement


def parse_gpu(text: str) -> GPUSpec:
    """A GPU's name, or its memory such as "24GB". Raises: UserError."""
    if text.lower() in GPUS:
        return GPUS[text.lower()]
    try:
        size = float(text.lower().removesuffix("gb"))
    except ValueError:
        size = math.nan
    if not 0 < size < math.inf:
        raise UserError(f"--gpu {text}: give a size such as 24GB, or one of {', '.join(GPUS)}")
    return GPUSpec(size * 1e9, 0.0)
