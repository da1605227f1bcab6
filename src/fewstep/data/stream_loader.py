"""The loader of a stream: worker processes, and a position that is saved and restored."""

from __future__ import annotations

import signal
import warnings
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

from fewstep.core.seeds import generator
from fewstep.data.shuffled_stream import ShuffledStream
from fewstep.errors import UserError

if TYPE_CHECKING:
    from torchdata.stateful_dataloader import StatefulDataLoader

T = TypeVar("T")


def check_packages(key: str) -> None:
    """Raises: UserError if a package is missing that reads the stream of a recipe's ``key``."""
    try:
        import datasets  # noqa: F401
        import torchdata.stateful_dataloader  # noqa: F401
    except ImportError:
        raise UserError(f"{key} needs torchdata and datasets; pip install 'fewstep[stream]'") from None


def stream_loader(
    stream: ShuffledStream[T],
    seed: int,
    workers: int,
    prefetched: int,
    convert: Callable[[T | UserError], Any] | None = None,
) -> StatefulDataLoader[Any]:
    """The items of one process, one by one without end; none is another worker's.

    Args:
        workers: processes that read ahead, at most one per file; 0 reads in this one.
        prefetched: items that each of them reads ahead.
        convert: changes each item, where it was read, after it was shuffled.
    """
    from torchdata.stateful_dataloader import StatefulDataLoader

    workers = min(workers, stream.rows.num_shards)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="'set_vital' is deprecated")  # torchdata calls it
        return StatefulDataLoader(
            stream,
            batch_size=None,
            num_workers=workers,
            collate_fn=convert,
            prefetch_factor=prefetched if workers else None,
            worker_init_fn=_outlive_one_signal,
            generator=generator("loader", seed),  # else each iteration draws from the training's own generator
        )


def _outlive_one_signal(worker: int) -> None:
    """Ctrl-C and SIGTERM may reach a worker too: only the second ends it, as the main process still saves a checkpoint
    after the first."""

    def ignore_once(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, ignore_once)
