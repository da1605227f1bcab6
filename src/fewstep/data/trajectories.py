"""What a teacher said, kept on disk: encoded prompts and the teacher's way from noise to image, in numbered shards.

    index.json              fingerprint, number of samples, size of a shard
    shard-00000.safetensors states [n, K, C, H, W] (fp16), features, lengths; the prompts' texts in its metadata

Sample i starts from the noise of seed ``first_seed + i``, which is not stored. A cache of another teacher, prompt
template or schedule is refused, never silently used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fewstep.core.conditioning import EncodedPrompts
from fewstep.errors import UserError
from fewstep.models.pipeline import TextToImagePipeline
from fewstep.models.text import PromptEncoder

FORMAT = 1
INDEX = "index.json"


@dataclass(frozen=True)
class Index:
    """What a cache holds. ``fingerprint``: what made it; two caches with equal ones hold the same for equal samples."""

    fingerprint: Mapping[str, object]
    samples: int
    shard_size: int
    first_seed: int
    format: int = FORMAT

    @property
    def shards(self) -> int:
        return -(-self.samples // self.shard_size)

    def members(self, shard: int) -> range:
        """The numbers of a shard's samples."""
        return range(shard * self.shard_size, min(self.samples, (shard + 1) * self.shard_size))


def weights_hash(module: nn.Module) -> str:
    """A hash of a module's weights: names, shapes, values. LoRA stacks on it do not count, nor does the precision in
    which the same weights were loaded."""
    total = hashlib.blake2b(digest_size=16)
    weights = {name.replace(".base_layer.", "."): tensor for name, tensor in module.state_dict().items()}
    for name, tensor in sorted(weights.items()):
        if ".lora_" in name:
            continue
        values = tensor.detach().cpu().to(torch.bfloat16).contiguous().flatten()
        total.update(f"{name}{tuple(tensor.shape)}".encode())
        total.update(values.view(torch.uint8).numpy().data)
    return total.hexdigest()


def fingerprint(teacher: TextToImagePipeline, sigmas: Sequence[float], **settings: object) -> dict[str, object]:
    """What the contents of a cache depend on: the teacher's weights, the words around a prompt, the noise levels."""
    return {
        "transformer": weights_hash(teacher.transformer),
        **text_fingerprint(teacher.encoder),
        "sigmas": [round(sigma, 6) for sigma in sigmas],
        **settings,
    }


def text_fingerprint(encoder: PromptEncoder) -> dict[str, object]:
    """What encoded prompts depend on: the text encoder's weights, the tokenizer, the words around a prompt."""
    vocabulary = json.dumps(sorted(encoder.tokenizer.get_vocab().items()))
    template = encoder.template("prompt") + vocabulary
    return {
        "text_encoder": weights_hash(encoder.text_encoder),
        "template": hashlib.blake2b(template.encode(), digest_size=16).hexdigest(),
    }


def shard_file(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}.safetensors"


def write_index(folder: Path, index: Index) -> None:
    """Claim a folder for a cache, or find it claimed by the same one.

    Raises:
        UserError: another cache is there, or other files.
    """
    file = folder / INDEX
    if file.exists():
        found = read_index(folder)
        check_fingerprint(folder, index.fingerprint, found.fingerprint)
        if found != index:
            raise UserError(f"{folder}: a cache of other size or seed is there; use another --out, or --overwrite")
        return
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder}: has files but no {INDEX}; use another --out")
    folder.mkdir(parents=True, exist_ok=True)
    aside = file.with_suffix(".partial")
    aside.write_text(json.dumps(asdict(index), indent=1), encoding="utf-8")
    aside.replace(file)


def read_index(folder: Path) -> Index:
    """Raises: UserError if there is none, or it cannot be read."""
    file = folder / INDEX
    try:
        index = Index(**json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"{folder}: no cache there ({INDEX} is missing); make it with fewstep cache") from None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file}: cannot be read ({error})") from None
    if index.format != FORMAT:
        raise UserError(f"{file}: has format {index.format}, this version reads {FORMAT}")
    return index


def check_fingerprint(folder: Path, wanted: Mapping[str, object], found: Mapping[str, object]) -> None:
    """Raises: UserError that names what differs."""
    differing = [key for key in {**wanted, **found} if wanted.get(key) != found.get(key)]
    if differing:
        raise UserError(f"{folder}: was made with another {', '.join(differing)}; make a new one")


def write_shard(file: Path, states: Tensor, prompts: EncodedPrompts, texts: Sequence[str]) -> None:
    """Write a shard aside and move it into place: it is whole or not there."""
    aside = file.with_suffix(".partial")
    tensors = {"states": states.half(), "features": prompts.features, "lengths": prompts.lengths}
    save_file(
        {name: tensor.cpu().contiguous() for name, tensor in tensors.items()},
        aside,
        {"prompts": json.dumps(list(texts), ensure_ascii=False)},
    )
    aside.replace(file)


class TrajectoryCache:
    """A finished cache, read by sample numbers; only what is asked for is read from disk.

    Args:
        expected: the fingerprint that the reader's own teacher and schedule give.

    Raises:
        UserError: no cache, an unfinished one, a damaged shard, or one of another fingerprint.
    """

    def __init__(self, folder: str | Path, expected: Mapping[str, object]) -> None:
        self.folder = Path(folder)
        self.index = read_index(self.folder)
        check_fingerprint(self.folder, expected, self.index.fingerprint)
        missing = [n for n in range(self.index.shards) if not shard_file(self.folder, n).exists()]
        if missing:
            raise UserError(
                f"{self.folder}: {len(missing)} of {self.index.shards} shards are missing; fewstep cache goes on"
            )
        self._shards = [self._open(n) for n in range(self.index.shards)]

    def __len__(self) -> int:
        return self.index.samples

    def _open(self, shard: int):  # type: ignore[no-untyped-def]  # safetensors names no type for it
        file = shard_file(self.folder, shard)
        try:
            return safe_open(file, "pt")
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file}: damaged ({error}); delete it and let fewstep cache go on") from None

    def seeds(self, samples: Sequence[int]) -> list[int]:
        return [self.index.first_seed + i for i in samples]

    def read(self, samples: Sequence[int]) -> tuple[Tensor, EncodedPrompts]:
        """States [B, K, C, H, W] in fp32, and the encoded prompts of these samples."""
        states, prompts = [], []
        for sample in samples:
            shard, row = divmod(sample, self.index.shard_size)
            read = {
                name: self._shards[shard].get_slice(name)[row : row + 1] for name in ("states", "features", "lengths")
            }
            states.append(read["states"].float())
            prompts.append(EncodedPrompts(read["features"], read["lengths"])[:])
        return torch.cat(states), EncodedPrompts.concat(prompts)
