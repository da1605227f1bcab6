"""The LoRA files that requests may name: those of one folder."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

from fewstep.errors import UserError
from fewstep.machine import reading
from fewstep.models.fingerprint import path_fingerprint
from fewstep.models.lora.bind import read_lora
from fewstep.models.lora.merge import Weighted
from fewstep.models.lora.read import weights_file
from fewstep.models.lora.targets import LoraTargets
from fewstep.models.lora.weights import Lora

CAPACITY = 2**31  # bytes of adapters that are kept in memory
MAX_LORAS = 8  # of one request
MAX_STRENGTH = 10.0

#: Names and strengths, in the order of the names: what a request's images are drawn with.
Chosen = tuple[tuple[str, float], ...]


class LoraFolder:
    """LoRA files by name: a file's without its ending, or that of a folder of peft or diffusers.

    All are read and checked at once. Those that were used last stay in memory.

    Args:
        folder: None has no files.
        targets: the layers of the model.
        capacity: bytes of adapters in memory; at least the last one stays.

    Raises:
        UserError: the folder cannot be read or has no LoRA, two have one name, or a file cannot be used: it is named.
    """

    def __init__(self, folder: str | Path | None, targets: LoraTargets, capacity: int = CAPACITY) -> None:
        self.targets, self.capacity = targets, capacity
        self._files = {} if folder is None else _named_files(Path(folder).expanduser())
        self._kept: OrderedDict[str, Lora] = OrderedDict()
        self._fingerprints: dict[str, str | None] = {}
        for name in self._files:
            self._fingerprints[name] = path_fingerprint(self._files[name])
            self._load(name)

    @property
    def names(self) -> list[str]:
        return list(self._files)

    def check(self, wanted: Mapping[str, float]) -> Chosen:
        """What a request names; what has no effect is left out. Raises: UserError for an unknown name."""
        for name in wanted:
            if name not in self._files:
                known = f"there are {', '.join(self._files)}" if self._files else "this server has none"
                raise UserError(f"lora: {name[:100]!r} is not known; {known}")
        return tuple(sorted((name, strength) for name, strength in wanted.items() if strength))

    def fingerprint(self, name: str) -> str:
        """Of the file's content when the server started."""
        return self._fingerprints[name] or ""

    def get(self, chosen: Chosen) -> Weighted:
        """Adapters with their strengths. Raises: UserError if a file changed since it was checked."""
        return [(self._lora(name), strength) for name, strength in chosen]

    def _lora(self, name: str) -> Lora:
        if name in self._kept:
            self._kept.move_to_end(name)
            return self._kept[name]
        if path_fingerprint(self._files[name]) != self._fingerprints[name]:
            raise UserError(f"lora: the file of {name!r} has changed since this server started")
        return self._load(name)

    def _load(self, name: str) -> Lora:
        lora = self._kept[name] = read_lora(self._files[name], self.targets)
        while len(self._kept) > 1 and sum(one.nbytes for one in self._kept.values()) > self.capacity:
            self._kept.popitem(last=False)
        return lora


def _named_files(folder: Path) -> dict[str, Path]:
    with reading(folder):
        entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    found: dict[str, Path] = {}
    for path in entries:
        if path.suffix != ".safetensors" and not path.is_dir():
            continue
        name = path.name if path.is_dir() else path.stem
        if name in found:
            raise UserError(f"{path}: {found[name]} has the same name, {name}; rename one of them")
        found[name] = weights_file(path)
    if not found:
        raise UserError(f"{folder}: no LoRA files; put .safetensors files there, or folders of peft or diffusers")
    return found
