"""Batches of noise and encoded prompts from a stream."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor

from fewstep.core.conditioning import EncodedPrompts
from fewstep.core.method import Shard, StreamSource
from fewstep.core.seeds import noise_rows
from fewstep.data.batch import DistillBatch
from fewstep.data.prompt_stream import fits
from fewstep.errors import UserError
from fewstep.models.pipeline import TextToImagePipeline
from fewstep.progress import log_line

#: Prompts that are encoded together; no more features are in memory. Where the text encoder is offloaded, it is moved
#: to the device once for all of them.
ENCODED = 256
_MOST_TOO_LONG = 10_000  # in a row

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Loader(Protocol[T_co]):
    """The items of one process, without end; a mistake in the data is one. torchdata's ``StatefulDataLoader``."""

    def __iter__(self) -> Iterator[T_co | UserError]: ...

    def state_dict(self) -> dict[str, Any]:
        """JSON values from which the next items follow."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave; {} is the start."""
        ...


class ItemStream(Protocol[T]):
    """A stream of items, each of which has a prompt."""

    @property
    def source(self) -> str:
        """Where it comes from, for messages."""
        ...

    def loader(self, seed: int, shard: Shard) -> Loader[T]:
        """The items of one process; none is another's."""
        ...

    def text(self, item: T) -> str:
        """The prompt of an item."""
        ...


class StreamBatches(StreamSource, Generic[T]):
    """Batches of ``size`` prompts and pure noise. Each process reads and encodes its own rows; the noise of a row
    depends on its place in the batch alone, as in other batches. Prompts that are too long are left out.

    Raises:
        UserError: when called, as the stream's source is read then.
    """

    def __init__(self, model: TextToImagePipeline, stream: ItemStream[T], size: int, seed: int) -> None:
        self.model, self.stream, self.size, self.seed = model, stream, size, seed
        self.shape = model.latent_shape(*model.generation_config.size)
        self._reported = False  # that a prompt is too long
        self.load_state_dict({"position": 0, "loader": {}, "used": 0})

    def state_dict(self) -> dict[str, Any]:
        """The number of the next batch, the loader's state before the items that were last read ahead, and how many
        batches of these are used."""
        return {"position": self._position, "loader": self._start, "used": self._used}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._position, self._start, self._used = state["position"], state["loader"], state["used"]
        self._items: Iterator[T | UserError] | None = None
        self._ahead: deque[tuple[list[T], list[Tensor]]] = deque()

    def __call__(self, position: int, shard: Shard = Shard()) -> DistillBatch:  # noqa: B008  # frozen
        if position != self._position:
            raise ValueError(f"batch {position} of a stream whose next batch is {self._position}")
        rows = shard.rows(self.size)
        while not self._ahead:
            self._read_ahead(shard, rows.stop - rows.start)
        items, features = self._ahead.popleft()
        self._position += 1
        self._used += 1
        noise, device = noise_rows(rows, self.shape, "noise", self.seed, position), self.model.device
        texts = [self.stream.text(item) for item in items]
        return DistillBatch(noise.to(device), EncodedPrompts.pad(features).to(device), self.states(items), texts)

    def states(self, items: Sequence[T]) -> Tensor | None:
        """``DistillBatch.states`` of the items of a batch; None where they have prompts alone."""
        return None

    def _read_ahead(self, shard: Shard, count: int) -> None:
        """Read and encode the next batches of ``count`` prompts; after a resume, those that were used are dropped."""
        if self._items is None:
            self._loader = self.stream.loader(self.seed, shard)
            self._loader.load_state_dict(self._start)
            self._items = iter(self._loader)
        else:
            self._start, self._used = self._loader.state_dict(), 0
        items = [self._next_item(self._items) for _ in range(count * max(1, ENCODED // count))]
        encoder = self.model.encoder
        with encoder.on_device():
            # uncached: features depend on the batch that they are encoded in, which is the same after a resume
            encoded = encoder.encode_uncached([self.stream.text(item) for item in items])
            features = [feature.cpu() for feature in encoded]
        parts = [slice(start, start + count) for start in range(0, len(items), count)]
        self._ahead = deque((items[part], features[part]) for part in parts[self._used :])

    def _next_item(self, items: Iterator[T | UserError]) -> T:
        encoder = self.model.encoder
        for _ in range(_MOST_TOO_LONG):
            item = next(items)
            if isinstance(item, UserError):
                raise item
            if fits(encoder, self.stream.text(item)):
                return item
            if not self._reported:
                log_line(f"{self.stream.source}: prompts of more than {encoder.max_tokens} tokens are left out")
            self._reported = True
        raise UserError(
            f"{self.stream.source}: {_MOST_TOO_LONG} prompts in a row have more than {encoder.max_tokens} tokens; name "
            "another prompts.column"
        )
