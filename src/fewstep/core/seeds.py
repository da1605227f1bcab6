"""Seeds of independent random streams, derived from what each stream is for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import torch
from torch import Tensor

#: Seeds are integers from 0 to this one: the range of ``torch.Generator.manual_seed`` (``config.base.Seed`` checks it).
MAX_SEED = 2**64 - 1


def image_seed(first: int, index: int) -> int:
    """The seed of image ``index`` in a row that starts from the seed ``first``; it wraps around after ``MAX_SEED``."""
    return (first + index) % (MAX_SEED + 1)


def derive_seed(*keys: int | str) -> int:
    """A seed in [0, 2^63) from a purpose and numbers, such as ``derive_seed("noise", seed, position)``.

    It is a hash, because torch's CPU generator uses the low 32 bits of a seed alone: with an offset of 2^32 or more, it
    repeats the stream of the plain seed.
    """
    digest = hashlib.blake2b(json.dumps(keys).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(*keys: int | str) -> torch.Generator:
    """A CPU generator with the seed of these keys."""
    return torch.Generator("cpu").manual_seed(derive_seed(*keys))


def noise_rows(rows: slice, shape: Sequence[int], *keys: int | str) -> Tensor:
    """Gaussian noise [len(rows), *shape], each row from its own generator: a process draws its own rows alone.

    Args:
        rows: of the whole batch, with start and stop.
    """
    return torch.stack([torch.randn(*shape, generator=generator(*keys, row)) for row in range(rows.start, rows.stop)])
