"""Writes a training's checkpoints, at once or in the background while the training continues."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from fewstep.training import checkpoint
from fewstep.training.distributed import DistContext


class CheckpointWriter:
    """One checkpoint is written at a time: the next one waits for it.

    Args:
        background: copy the tensors to the CPU's memory and return; a thread writes them. Several processes then talk
            over a gloo group of their own, beside the training's.
    """

    def __init__(self, dist: DistContext, background: bool) -> None:
        self.dist, self.background = dist.beside() if background else dist, background
        self._pool: ThreadPoolExecutor | None = None
        self._written: Future[Path] | None = None

    def write(
        self,
        directory: Path,
        step: int,
        groups: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        keep: int,
        protect: Collection[int] = (),
    ) -> None:
        """As :func:`checkpoint.save`. Every process calls it.

        Raises:
            UserError: this checkpoint cannot be written; in the background, the one before.
        """
        self.wait()
        if not self.background:
            checkpoint.save(directory, step, groups, state, keep, protect, self.dist)
            return
        staged = {
            group: {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
            for group, tensors in groups.items()
        }
        self._pool = self._pool or ThreadPoolExecutor(1, "checkpoint")
        self._written = self._pool.submit(
            checkpoint.save, directory, step, staged, copy.deepcopy(dict(state)), keep, tuple(protect), self.dist
        )

    def wait(self) -> None:
        """Returns when the last checkpoint is on the disk. Raises: UserError if it cannot be written."""
        written, self._written = self._written, None
        if written is not None:
            written.result()
