"""What an image was made with besides the model, the prompt and the parameters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import Field

from fewstep.config.base import PlainValues
from fewstep.errors import UserError
from fewstep.models.fingerprint import path_fingerprint
from fewstep.models.lora.read import weights_file


class UsedFile(PlainValues):
    """A file or folder beside the model that an image was made with."""

    path: str = Field(description="As its user wrote it, or the name that a server has for it.")
    fingerprint: str = Field(description="Of its content.")

    @classmethod
    def of(cls, path: str) -> Self:
        """Of what is there now."""
        return cls(path=path, fingerprint=path_fingerprint(Path(path).expanduser()) or "")

    def checked(self, image: str | Path, option: str) -> str:
        """The path. Raises: UserError if it is not there, or has another content.

        Args:
            image: that was made with it.
            option: gives another path on the command line.
        """
        if path_fingerprint(Path(self.path).expanduser()) != self.fingerprint:
            raise UserError(f"{image}: was made with {self.path}, which is not there or has changed; give {option}")
        return self.path


class UsedLora(UsedFile):
    """A LoRA file, and how much of it."""

    strength: float


class Extras(PlainValues):
    """Attributes:
    original_prompt: as its user wrote it, where it was revised.
    loras: in the order of their paths.
    ignored_keys: of the LoRA files, left out.
    vae: in place of the model's own.
    image, mask: of an edit.
    references: images that a model edited by instruction, in their order.
    """

    original_prompt: str | None = None
    loras: tuple[UsedLora, ...] = ()
    ignored_keys: tuple[str, ...] = ()
    vae: UsedFile | None = None
    image: UsedFile | None = None
    mask: UsedFile | None = None
    references: tuple[UsedFile, ...] = ()

    def known_by(self) -> dict[str, Any]:
        """What images depend on, wherever the files are: contents and strengths; without what there is not."""
        files = {"vae": self.vae, "image": self.image, "mask": self.mask}
        found: dict[str, Any] = {name: used.fingerprint for name, used in files.items() if used is not None}
        if self.loras:
            found["loras"] = sorted([used.strength, used.fingerprint] for used in self.loras)
        if self.ignored_keys:
            found["ignored keys"] = sorted(self.ignored_keys)
        if self.references:
            found["references"] = [used.fingerprint for used in self.references]
        return found


def used_loras(loras: Mapping[str, float]) -> tuple[UsedLora, ...]:
    """LoRA files or folders with their strengths. Raises: UserError if one is not there."""
    files = {str(weights_file(path)): strength for path, strength in loras.items()}
    return tuple(
        UsedLora(path=file, fingerprint=UsedFile.of(file).fingerprint, strength=strength)
        for file, strength in sorted(files.items())
    )
