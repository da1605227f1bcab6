"""Training prompts that are read as a stream: files, WebDataset shards or a Hugging Face dataset of any size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.config.sections import StreamSettings
from fewstep.core.method import Shard
from fewstep.data.prompt_fields import row_prompts
from fewstep.data.prompt_files import HUB, hub_errors, open_hub, prompt_files, read_texts
from fewstep.data.prompt_text import comparison_key
from fewstep.data.shuffled_stream import ShuffledStream
from fewstep.data.stream_loader import check_packages, stream_loader
from fewstep.errors import UserError
from fewstep.models.text import PromptEncoder

if TYPE_CHECKING:
    import datasets
    from torchdata.stateful_dataloader import StatefulDataLoader

PREFETCHED = 256  # prompts that each worker reads ahead


@dataclass(frozen=True)
class PromptStream:
    """A source of prompts that is never in memory as a whole.

    Attributes:
        source: see :func:`fewstep.data.prompt_files.read_texts`.
        column: column or key of the prompts.
        held_out: comparison keys of the validation and test prompts, which the stream leaves out.
    """

    source: str
    column: str
    settings: StreamSettings
    held_out: frozenset[str] = frozenset()

    @cached_property
    def rows(self) -> datasets.IterableDataset:
        """All rows, unread.

        Raises:
            UserError: a package is missing, or there is no such source.
        """
        check_packages("prompts.stream")  # a missing package is found before the models are loaded
        from datasets import IterableDataset

        with hub_errors(self.source):
            if not self.source.startswith(HUB):
                files = [str(path) for path in prompt_files(self.source)]
                return IterableDataset.from_generator(_file_rows, gen_kwargs={"files": files, "column": self.column})
            rows = open_hub(self.source)
            if self.column in (rows.column_names or []):
                return rows.select_columns([self.column])  # images beside it are neither read nor decoded
            return rows

    def loader(self, seed: int, shard: Shard) -> StatefulDataLoader[str | UserError]:
        """The prompts of one process, one by one without end; none is another process's or worker's. A mistake in the
        data is an item: see :class:`ShuffledStream`."""
        from datasets.distributed import split_dataset_by_node

        rows = split_dataset_by_node(self.rows, shard.rank, shard.world_size)
        stream = ShuffledStream(rows, self.prompts, self.settings.shuffle_buffer, seed, self.source)
        return stream_loader(stream, seed, self.settings.num_workers, PREFETCHED)

    def text(self, item: str) -> str:
        return item

    def prompts(self, row: Any) -> list[str]:
        """The prompts of a row that are trained on."""
        found = row_prompts(row, self.column if self.source.startswith(HUB) else _TEXT, self.source)
        return [text for text in found if text and comparison_key(text) not in self.held_out]

    def leaves_out(self, texts: Iterable[str]) -> bool:
        """Whether the stream leaves out all of these prompts."""
        return self.held_out.issuperset(map(comparison_key, texts))

    def first(self, count: int, encoder: PromptEncoder) -> list[str]:
        """The first prompts in the source's own order that fit a text encoder."""
        with hub_errors(self.source):
            texts = (text for row in self.rows for text in self.prompts(row) if fits(encoder, text))
            return list(islice(texts, count))


#: Prompts to train on, as a list or as a stream.
TrainingPrompts = Sequence[str] | PromptStream


def listed(prompts: TrainingPrompts) -> Sequence[str]:
    """A list of prompts as it is. Raises: UserError for a stream."""
    if isinstance(prompts, PromptStream):
        raise UserError(
            f"prompts.source={prompts.source}: a list of prompts is needed here, and prompts.stream reads no list; set "
            "prompts.stream=null"
        )
    return prompts


def listed_or_first(prompts: TrainingPrompts, count: int, encoder: PromptEncoder) -> Sequence[str]:
    """A list of prompts as it is, or the first ones of a stream."""
    return prompts.first(count, encoder) if isinstance(prompts, PromptStream) else prompts


def fits(encoder: PromptEncoder, text: str) -> bool:
    """Whether a prompt is short enough for a text encoder."""
    return encoder.count(text) <= encoder.max_tokens


_TEXT = "text"


def _file_rows(files: Sequence[str], column: str) -> Iterator[dict[str, str]]:
    for file in files:
        for text in read_texts(Path(file), column):
            yield {_TEXT: text}
