"""A teacher's trajectories on disk: encoded prompts and the states from noise to image, in numbered shards.

    index.json              fingerprint, number of samples, size of a shard
    shard-00000.safetensors states [n, K, C, ..., H, W] (fp16), features, lengths; the prompts' texts as metadata

Sample i starts from the noise of seed ``first_seed + i``, which is not stored. A cache of another teacher, prompt
template or schedule is refused, never silently used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from fewstep.atomic import is_litter, write_tensors, write_text
from fewstep.core.conditioning import EncodedPrompts
from fewstep.core.seeds import image_seed
from fewstep.errors import UserError
from fewstep.machine import reading
from fewstep.models.adapters import is_adapter_key
from fewstep.models.pipeline import TextToImagePipeline
from fewstep.models.text import PromptEncoder

FORMAT = 1
INDEX = "index.json"
_DAMAGED = "damaged, delete it and resume fewstep cache-trajectories"


@dataclass(frozen=True)
class Index:
    """Contents of a cache. ``fingerprint``: what made it; caches with equal ones agree on equal samples."""

    fingerprint: Mapping[str, object]
    samples: int
    shard_size: int
    first_seed: int
    format: int = FORMAT

    @property
    def shards(self) -> int:
        return -(-self.samples // self.shard_size)

    def sample_range(self, shard: int) -> range:
        """The numbers of a shard's samples."""
        return range(shard * self.shard_size, min(self.samples, (shard + 1) * self.shard_size))

    def seeds(self, samples: Sequence[int]) -> list[int]:
        """The seeds of samples, by their numbers."""
        return [image_seed(self.first_seed, i) for i in samples]


def weights_hash(module: nn.Module) -> str:
    """A hash of a module's weights: names, shapes, values in bf16. LoRA adapters are left out, and the data type in
    which the weights were loaded makes no difference."""
    total = hashlib.blake2b(digest_size=16)
    weights = {name.replace(".base_layer.", "."): tensor for name, tensor in module.state_dict().items()}
    for name, tensor in sorted(weights.items()):
        if is_adapter_key(name):
            continue
        values = tensor.detach().cpu().to(torch.bfloat16).contiguous().flatten()
        total.update(f"{name}{tuple(tensor.shape)}".encode())
        total.update(values.view(torch.uint8).numpy().data)
    return total.hexdigest()


def fingerprint(teacher: TextToImagePipeline, sigmas: Sequence[float], **settings: object) -> dict[str, object]:
    """What the contents of a cache depend on: the teacher's weights, the prompt template, the noise levels."""
    return {
        "transformer": weights_hash(teacher.transformer),
        **text_fingerprint(teacher.encoder),
        "sigmas": [round(sigma, 6) for sigma in sigmas],
        **settings,
    }


def text_fingerprint(encoder: PromptEncoder) -> dict[str, object]:
    """What encoded prompts depend on: the text encoder's weights, the tokenizer, the prompt template."""
    return {"text_encoder": weights_hash(encoder.text_encoder), "template": template_hash(encoder)}


def template_hash(encoder: PromptEncoder) -> str:
    """A hash of the tokenizer's vocabulary and the prompt template."""
    vocabulary = json.dumps(sorted(encoder.tokenizer.get_vocab().items()))
    template = encoder.template("prompt") + vocabulary
    return hashlib.blake2b(template.encode(), digest_size=16).hexdigest()


def shard_file(folder: Path, shard: int) -> Path:
    """The file of a shard, by its number from 0."""
    return folder / f"shard-{shard:05d}.safetensors"


def is_complete(folder: Path, index: Index) -> bool:
    """Whether a folder holds this cache with all its shards. Raises: UserError if its index cannot be read."""
    if not (folder / INDEX).exists() or read_index(folder) != index:
        return False
    return all(shard_file(folder, shard).exists() for shard in range(index.shards))


def check_cache_folder(folder: Path, overwrite: bool) -> None:
    """Find, before a teacher is loaded, a folder that can hold no cache.

    Raises:
        UserError: the folder holds other files, or an index that cannot be read.
    """
    if (folder / INDEX).exists():
        _own_files(folder) if overwrite else read_index(folder)
    elif folder.exists() and not all(is_litter(path) for path in folder.iterdir()):
        raise UserError(f"{folder}: has files but no {INDEX}; use another --out")


def write_index(folder: Path, index: Index) -> None:
    """Make a folder a cache, unless it is the same one already.

    Raises:
        UserError: the folder holds another cache, or other files.
    """
    file = folder / INDEX
    if file.exists():
        found = read_index(folder)
        check_fingerprint(folder, index.fingerprint, found.fingerprint)
        if found != index:
            raise UserError(f"{folder} holds a cache of another size or seed; use another --out, or --overwrite")
        return
    check_cache_folder(folder, overwrite=False)
    write_text(file, json.dumps(asdict(index), indent=1))


def read_index(folder: Path) -> Index:
    """Raises: UserError if there is none, or it cannot be read."""
    file = folder / INDEX
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if "kind" in content:
            raise UserError(f"{folder}: encoded {content['kind']}, not trajectories; name it in prompts.source")
        index = Index(**content)
    except FileNotFoundError:
        raise UserError(
            f"{folder} is not a cache ({INDEX} is missing); make one with fewstep cache-trajectories"
        ) from None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file}: cannot be read ({error})") from None
    if index.format != FORMAT:
        raise UserError(f"{file}: has format {index.format}, this version reads format {FORMAT}")
    return index


def delete_cache(folder: Path) -> None:
    """Delete a cache from its folder. Raises: UserError, before anything is deleted, if there are other files."""
    for path in _own_files(folder):  # the folder stays: it is locked
        path.unlink()


def _own_files(folder: Path) -> list[Path]:
    """A cache's files. Raises: UserError for any other file there."""
    found = list(folder.iterdir())
    for path in found:
        if path.name != INDEX and not path.name.startswith("shard-") and not is_litter(path):
            raise UserError(f"{path} was not written by fewstep cache-trajectories; use another --out")
    return found


def check_fingerprint(folder: Path, wanted: Mapping[str, object], found: Mapping[str, object]) -> None:
    """Raises: UserError that names the keys that differ."""
    differing = [key for key in {**wanted, **found} if wanted.get(key) != found.get(key)]
    if differing:
        raise UserError(f"{folder}: was made with another {', '.join(differing)}; make a new one")


def write_shard(file: Path, states: Tensor, prompts: EncodedPrompts, texts: Sequence[str]) -> None:
    """Write a shard; the file is complete or absent. ``states``: [n, K, C, ..., H, W]."""
    tensors = {"states": states.half(), "features": prompts.features, "lengths": prompts.lengths}
    write_tensors(file, tensors, {"prompts": json.dumps(list(texts), ensure_ascii=False)})


class TrajectoryCache:
    """A complete cache, read by sample numbers; only the requested samples are read from disk.

    Args:
        expected: the fingerprint of the reader's teacher and schedule.

    Raises:
        UserError: no cache, an incomplete or damaged one, or one of another fingerprint.
    """

    def __init__(self, folder: str | Path, expected: Mapping[str, object]) -> None:
        self.folder = Path(folder)
        self.index = read_index(self.folder)
        check_fingerprint(self.folder, expected, self.index.fingerprint)
        missing = [n for n in range(self.index.shards) if not shard_file(self.folder, n).exists()]
        if missing:
            raise UserError(
                f"{self.folder}: {len(missing)} of {self.index.shards} shards are missing; resume fewstep "
                "cache-trajectories"
            )
        self._shards = [self._open(n) for n in range(self.index.shards)]
        self._texts = lru_cache(maxsize=256)(self._read_texts)

    def __len__(self) -> int:
        return self.index.samples

    def _open(self, shard: int):  # type: ignore[no-untyped-def]  # safetensors has no public type for it
        file = shard_file(self.folder, shard)
        with reading(file, _DAMAGED):
            return safe_open(file, "pt")

    def texts(self) -> Iterator[str]:
        """The prompts of all samples, in order."""
        for shard in range(len(self._shards)):
            yield from self._read_texts(shard)

    def texts_of(self, samples: Sequence[int]) -> list[str]:
        """The prompts of these samples."""
        places = [divmod(sample, self.index.shard_size) for sample in samples]
        return [self._texts(shard)[row] for shard, row in places]

    def _read_texts(self, shard: int) -> list[str]:
        found: list[str] = json.loads(self._shards[shard].metadata()["prompts"])
        return found

    def seeds(self, samples: Sequence[int]) -> list[int]:
        return self.index.seeds(samples)

    def read(self, samples: Sequence[int]) -> tuple[Tensor, EncodedPrompts]:
        """States [B, K, C, ..., H, W] in fp32, and the encoded prompts of these samples."""
        states, prompts = [], []
        for sample in samples:
            shard, row = divmod(sample, self.index.shard_size)
            opened, names = self._shards[shard], ("states", "features", "lengths")
            with reading(shard_file(self.folder, shard), _DAMAGED):
                read = {name: opened.get_slice(name)[row : row + 1] for name in names}
            states.append(read["states"].float())
            prompts.append(EncodedPrompts(read["features"].float(), read["lengths"])[:])
        return torch.cat(states), EncodedPrompts.concat(prompts)
