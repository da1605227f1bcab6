"""Images, and what is computed of them, divided among processes: each makes its share, and all have the whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fewstep.core.method import Shard
from fewstep.inference.generate import generate
from fewstep.inference.params import SamplingParams
from fewstep.models.pipeline import TextToImagePipeline


def _alone(part: Any) -> list[Any]:
    return [part]


@dataclass(frozen=True)
class Divided:
    """How rows are divided; by default there is one process. All processes must make the same calls.

    Attributes:
        shard: this process, and the number of those with rows of their own.
        gather: a process's part -> the parts of all of these, in order.
    """

    shard: Shard = field(default_factory=Shard)
    gather: Callable[[Any], list[Any]] = _alone

    def rows(self, count: int) -> list[int]:
        """This process's rows of ``count``. All have equally many, so that sharded models are called as often on each:
        the last row may be repeated."""
        each = -(-count // self.shard.world_size)
        first = self.shard.rank * each
        return [min(row, count - 1) for row in range(first, first + each)]

    def apply(self, function: Callable[[list[int]], Tensor], count: int) -> Tensor:
        """What a function of rows gives for ``count`` of them."""
        return self.join(function(self.rows(count)), count)

    def join(self, part: Tensor, count: int) -> Tensor:
        """``count`` rows of all processes' parts; on the CPU where there are several."""
        if self.shard.world_size == 1:
            return part
        return torch.cat(self.gather(part.cpu()))[:count]

    def generate(
        self, pipeline: TextToImagePipeline, prompts: Sequence[str], params: SamplingParams | None = None
    ) -> Tensor:
        """The images of :func:`fewstep.inference.generate.generate`, uint8 [N, H, W, 3] or [N, F, H, W, 3]."""
        chosen = params or SamplingParams()
        seeds = chosen.image_seeds(len(prompts))

        def own(rows: list[int]) -> Tensor:
            changed = chosen.model_copy(update={"seeds": tuple(seeds[row] for row in rows)})
            return generate(pipeline, [prompts[row] for row in rows], changed).images

        return self.apply(own, len(prompts))
