"""Real latents and images that are read as a stream of WebDataset shards of any size."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.config.sections import StreamSettings
from fewstep.core.method import Shard
from fewstep.core.registry import image_sources
from fewstep.data.prompt_files import expand_braces, hub_errors
from fewstep.data.prompt_text import comparison_key
from fewstep.data.real_samples import RealSample, SampleFormat, StoredSample, shard_rows
from fewstep.data.shuffled_stream import ShuffledStream
from fewstep.data.stream_loader import check_packages, stream_loader
from fewstep.data.tar_samples import check_webdataset
from fewstep.errors import UserError
from fewstep.machine import reading
from fewstep.models.pipeline import TextToImagePipeline

if TYPE_CHECKING:
    import datasets
    from torchdata.stateful_dataloader import StatefulDataLoader

KEY = "method.real_source"
_CONTENT = "samples to train on"
_PREFETCHED = 16  # decoded samples that each worker reads ahead: an image of 1024 pixels has 3 MB


def shard_files(source: str) -> list[Path]:
    """The shards of a source: a ``.tar`` file, several as ``latents-{000..099}.tar``, or those of a folder in the order
    of their names, without hidden ones.

    Raises:
        UserError: there are none, or a package is missing.
    """
    check_packages(KEY)
    check_webdataset(KEY)
    path = Path(source)
    if path.is_dir():
        with reading(path):
            found = [file for file in sorted(path.iterdir()) if _is_shard(file) and not file.name.startswith(".")]
        if not found:
            raise UserError(f"{KEY}={source}: no .tar files in this folder; shards of latents or images are expected")
        return found
    paths = expand_braces(source) if "{" in source and not path.exists() else [path]
    for each in paths:
        if not _is_shard(each) or not each.is_file():
            named = "" if str(each) == source else f" (missing: {each})"
            raise UserError(
                f"{KEY}={source}: no .tar file or folder of them{named}, and no image source; image sources: "
                f"{', '.join(['teacher', *image_sources.names()])}"
            )
    return paths


def _is_shard(file: Path) -> bool:
    return file.suffix.lower() == ".tar"


@dataclass(frozen=True)
class RealStream:
    """Real samples that are never in memory as a whole.

    Attributes:
        source: see :func:`shard_files`.
        column: key of the prompts in ``.json`` members.
        format: of the model.
        held_out: comparison keys of the validation and test prompts, whose samples the stream leaves out.
    """

    source: str
    column: str
    settings: StreamSettings
    format: SampleFormat
    held_out: frozenset[str] = frozenset()

    @cached_property
    def rows(self) -> datasets.IterableDataset:
        """All rows, unread. Raises: UserError as :func:`shard_files`."""
        files = [str(path) for path in shard_files(self.source)]
        from datasets import IterableDataset

        return IterableDataset.from_generator(shard_rows, gen_kwargs={"files": files, "column": self.column})

    def loader(self, seed: int, shard: Shard) -> StatefulDataLoader[RealSample | UserError]:
        """The samples of one process, one by one without end; none is another process's or worker's. A mistake in the
        data is an item. Samples are shuffled as they are stored, and decoded afterwards."""
        from datasets.distributed import split_dataset_by_node

        rows = split_dataset_by_node(self.rows, shard.rank, shard.world_size)
        stream = ShuffledStream(*(rows, self.samples, self.settings.shuffle_buffer, seed, self.source), _CONTENT, _key)
        return stream_loader(stream, seed, self.settings.num_workers, _PREFETCHED, self._decode)

    def text(self, item: RealSample) -> str:
        return item.text

    def samples(self, row: Any) -> list[StoredSample]:
        """The samples of a row that are trained on: one for each of its prompts."""
        kept = [text for text in row["texts"] if text and comparison_key(text) not in self.held_out]
        return [StoredSample(row["key"], row["where"], text, row["kind"], row["content"]) for text in kept]

    def check_first(self) -> None:
        """Raises: UserError if there is no sample, or the first cannot be read: most mistakes are in all of them."""
        with hub_errors(self.source):
            sample = next((sample for row in self.rows for sample in self.samples(row)), None)
        if sample is None:
            raise UserError(f"{self.source}: no {_CONTENT} in it")
        self.format.decode(sample)

    def _decode(self, item: StoredSample | UserError) -> RealSample | UserError:
        if isinstance(item, UserError):
            return item
        try:
            return self.format.decode(item)
        except UserError as error:
            return error


def open_real_stream(
    model: TextToImagePipeline, source: str, column: str, settings: StreamSettings, held_out: Iterable[str]
) -> RealStream:
    """The samples of shards for a model, whose own latents they have or whose autoencoder encodes their images.

    Args:
        source: see :func:`shard_files`.
        column: key of the prompts in ``.json`` members.
        held_out: prompts whose samples are left out.

    Raises:
        UserError: there are no such shards, or the first sample is damaged or does not fit the model.
    """
    height, width, frames = model.generation_config.size
    target = SampleFormat(model.latent_shape(height, width, frames), height, width, frames)
    stream = RealStream(source, column, settings, target, frozenset(map(comparison_key, held_out)))
    stream.check_first()
    return stream


def _key(sample: StoredSample) -> str:
    return sample.key
