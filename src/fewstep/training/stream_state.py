"""The state of a batch source that reads a stream, in the checkpoints of a training."""

from __future__ import annotations

from typing import Any

from fewstep.core.method import BatchSource, StreamSource
from fewstep.errors import UserError
from fewstep.training.checkpoint import Checkpoint
from fewstep.training.distributed import DistContext


def stream_states(source: BatchSource, dist: DistContext) -> list[dict[str, Any]] | None:
    """Each process's state, in their order; None where the batches depend on their position alone."""
    return dist.all_gather_object(source.state_dict()) if isinstance(source, StreamSource) else None


def restore_stream(source: BatchSource, found: Checkpoint, dist: DistContext) -> None:
    """Continue a stream where a checkpoint has it.

    Raises:
        UserError: other processes read it then.
    """
    if isinstance(source, StreamSource):
        states = found.state["stream"]
        if len(states) != dist.world_size:
            raise UserError(
                f"{found.path}: {len(states)} processes read the run's stream, which {dist.world_size} cannot "
                f"resume; start {len(states)}, or start over with --overwrite"
            )
        source.load_state_dict(states[dist.rank])
