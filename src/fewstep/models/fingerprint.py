"""What identifies a model, a file or a folder wherever it lies: a fingerprint of its content, cheap for large files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from fewstep.atomic import is_litter
from fewstep.config.recipe import Recipe, flat_recipe
from fewstep.errors import UserError
from fewstep.models.components import component_folder
from fewstep.models.family import MODEL_INDEX, resolve_any_family
from fewstep.models.weight_files import weight_files

BLOCK, BLOCKS = 4096, 64  # bytes of a sample, samples of a large file
_VOLATILE = ("transformers_version", "dtype", "torch_dtype")  # keys that programs rewrite; so are those with "_"
#: Ends of the keys of recipes that name files or folders.
_PATH_KEYS = (
    *(".teacher", ".init", ".vae", ".text_encoder", ".trajectory.cache", ".dpo.votes"),
    *(".model", ".data.images", ".training_adapter", ".method.lora", ".vision_language_model"),
    *(".prompts.source", ".prompts.validation_source", ".prompts.test_source", ".student.step_chooser"),
    ".method.real_source",
)


def model_fingerprint(folder: Path) -> str:
    """A fingerprint of a model's components: their configurations, and samples of the files that are read.

    Neither its path nor other files in the folder count. A training changes nearly all weights, so that samples of 4 kB
    from 64 places of a file tell two models of one architecture apart; a file is not read whole.

    Raises:
        UserError: the folder is no model.
    """
    family = resolve_any_family(folder)
    total = hashlib.blake2b(digest_size=16)
    for name in family.component_names:
        part = folder / name
        for file in weight_files(part) if name in family.modules else _files(part):
            _add(total, f"{name}/{file.name}", _sample(file))
        if name in family.modules:
            _add(total, f"{name}/config", _configuration(part / "config.json"))
    return total.hexdigest()


def path_fingerprint(path: Path) -> str | None:
    """A fingerprint of a model's folder, of another folder with all its files, or of a file; None if it is not there or
    cannot be read."""
    try:
        if (path / MODEL_INDEX).is_file():
            return model_fingerprint(path)
        total = hashlib.blake2b(digest_size=16)
        if path.is_file():
            _add(total, "", _sample(path))
        elif path.is_dir():
            for file in _files(path):
                _add(total, file.relative_to(path).as_posix(), _sample(file))
        else:
            return None
        return total.hexdigest()
    except (OSError, UserError):
        return None


def _files(folder: Path) -> Iterator[Path]:
    """All files of a folder in a fixed order, without those of operating systems."""
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and not is_litter(path))


def _sample(file: Path) -> bytes:
    """The size of a file, and its content: whole if it is small, else its start, its end and evenly spaced blocks."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        if size <= BLOCK * BLOCKS:
            return size.to_bytes(8, "big") + stream.read()
        blocks = []
        for index in range(BLOCKS):
            stream.seek(index * (size - BLOCK) // (BLOCKS - 1))
            blocks.append(stream.read(BLOCK))
        return size.to_bytes(8, "big") + b"".join(blocks)


def _configuration(file: Path) -> bytes:
    found = json.loads(file.read_text(encoding="utf-8"))
    kept = {key: value for key, value in found.items() if not key.startswith("_") and key not in _VOLATILE}
    return json.dumps(kept, sort_keys=True).encode()


def _add(total: hashlib.blake2b, name: str, content: bytes) -> None:
    total.update(f"{name}\n{len(content)}\n".encode())
    total.update(content)


def recipe_fingerprints(recipe: Recipe) -> dict[str, str]:
    """The fingerprints of the models, prompts and caches that a recipe names, by dotted key: a run recognizes them
    after they were moved. What is not there is left out."""
    found: dict[str, str] = {}
    for key, value in flat_recipe(recipe.model_dump(mode="json")).items():
        if value == "teacher" and key.endswith("real_source"):  # the model's samples, not a folder of this name
            continue
        if isinstance(value, str) and f".{key}".endswith(_PATH_KEYS):
            fingerprint = path_fingerprint(_named_content(key.rpartition(".")[2], component_folder(value)))
            found |= {key: fingerprint} if fingerprint is not None else {}
    return found


def _named_content(key: str, path: Path) -> Path:
    """What of a folder a key stands for: a run's folder may hold an autoencoder beside its checkpoints."""
    component = "vae" if key == "init" else key
    return path / component if (path / component).is_dir() and not (path / MODEL_INDEX).is_file() else path
