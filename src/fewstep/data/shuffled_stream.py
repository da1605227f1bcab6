"""A stream of rows as an endless stream of items, such as prompts: shuffled, in bounded memory, and resumed exactly.

The files are shuffled in each epoch. The rows pass in blocks, each of which is read whole and shuffled: all that a
resumed stream needs is where its present block starts, and it reads that block again. The shuffle buffer of
``datasets`` is not used because its content is lost when a stream is resumed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch.utils.data import IterableDataset

from fewstep.core.seeds import derive_seed, generator
from fewstep.data.prompt_files import hub_errors
from fewstep.errors import UserError

if TYPE_CHECKING:
    import datasets

T = TypeVar("T")


class ShuffledStream(IterableDataset[T | UserError], Generic[T]):
    """The items of one process, or of one of its workers. A mistake in the data is the stream's last item: raised in a
    worker, it would come with a traceback.

    Args:
        rows: of this process.
        items: the items of a row; none where it has none to train on.
        block: items that are read and shuffled together.
        name: of the source, for messages.
        content: what the items are, for messages.
        key: a text that differs between items of different processes and workers.
    """

    def __init__(
        self,
        rows: datasets.IterableDataset,
        items: Callable[[Any], list[T]],
        block: int,
        seed: int,
        name: str,
        content: str = "prompts",
        key: Callable[[T], str] = str,
    ) -> None:
        self.rows, self.items, self.block, self.seed = rows, items, block, seed
        self.name, self.content, self.key = name, content, key
        self.load_state_dict({"epoch": 0, "blocks": 0, "start": None, "used": 0})
        # a buffer of one row has nothing to lose
        logging.getLogger("datasets.iterable_dataset").addFilter(lambda record: "shuffle buffer" not in str(record.msg))

    def state_dict(self) -> dict[str, Any]:
        """JSON values: the epoch, its finished blocks, where the present one starts, and its items used so far."""
        return {"epoch": self.epoch, "blocks": self.blocks, "start": self.start, "used": self.used}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state_dict` gave when the stream is next iterated over."""
        self.epoch, self.blocks = state["epoch"], state["blocks"]
        self.start, self.used = state["start"], state["used"]

    def __iter__(self) -> Iterator[T | UserError]:
        try:
            with hub_errors(self.name):
                while True:
                    yield from self._epoch()
                    if self.blocks == 0:
                        raise UserError(f"{self.name}: no {self.content} in it")
                    self.epoch, self.blocks, self.start = self.epoch + 1, 0, None
        except UserError as error:
            yield error

    def _epoch(self) -> Iterator[T]:
        seed = derive_seed("stream", self.seed, self.epoch)
        rows = self.rows.shuffle(seed, buffer_size=1, max_buffer_input_shards=1)  # of files alone
        if self.start is not None:
            rows.load_state_dict(self.start)
        iterator = iter(rows)
        while block := self._read_block(iterator):
            # with an item in the key, no two processes or workers have the same order
            keys = ("block", self.seed, self.epoch, self.blocks, self.key(block[0]))
            order = torch.randperm(len(block), generator=generator(*keys))
            for index in order[self.used :].tolist():
                self.used += 1
                yield block[index]
            self.start, self.used, self.blocks = rows.state_dict(), 0, self.blocks + 1

    def _read_block(self, rows: Iterator[Any]) -> list[T]:
        """The next items, from whole rows; empty at the end of the epoch."""
        block: list[T] = []
        for row in rows:
            block += self.items(row)
            if len(block) >= self.block:
                break
        return block
