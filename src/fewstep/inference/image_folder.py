"""A folder of generated images that is filled as they are made, and continued where it stopped.

    0000.png, 0001.png, ...   one image for each prompt, complete or absent; a video is a .webp
    generation.json           what the images depend on: model, sampling parameters, prompts

Images of another generation are refused, never replaced or mixed with.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.atomic import is_partial, write_text
from fewstep.data.images import read_image, to_pil
from fewstep.data.videos import read_video, write_video
from fewstep.errors import UserError
from fewstep.inference.image_extras import Extras
from fewstep.inference.params import SamplingParams
from fewstep.machine import read_error, reading, writing
from fewstep.outputs import write_image

MANIFEST = "generation.json"
_IMAGE = re.compile(r"\d{4,}\.(png|webp)")
_UNREADABLE = "delete it, and run the command again"


def generation_manifest(
    model: Path,
    prompts: Sequence[str],
    params: SamplingParams,
    dtype: str | None = None,
    extras: Extras | None = None,
) -> dict[str, Any]:
    """What generated images depend on, as JSON values, without loading the model.

    A model is known by the sizes and times of its files: it may be moved, and a file that was written again is another
    one. What changes the cost alone, such as the batch size, is left out.

    Args:
        model: its folder.
        dtype: the requested dtype of the weights; None is the stored one.
        extras: files besides the model.
    """
    files = sorted(path for path in model.rglob("*") if path.is_file() and not path.name.startswith("."))
    stats = {str(path.relative_to(model)): path.stat() for path in files}
    return {
        "format": 1,
        "model files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
        "dtype": dtype,
        **(extras or Extras()).known_by(),
        **params.model_dump(mode="json", exclude={"batch_size"}),
        "prompts": list(prompts),
    }


class ImageFolder:
    """The images of one generation. The folder exists, and this process alone writes into it.

    Args:
        made_by: :func:`generation_manifest`.
        frames: of each video; 1 is an image.
        overwrite: delete the images of another generation.
        advice: what to do about a folder that holds images of another generation.

    Raises:
        UserError: the folder holds images of another generation, or numbered images without their manifest.
    """

    def __init__(
        self,
        folder: str | Path,
        made_by: Mapping[str, Any],
        *,
        frames: int = 1,
        overwrite: bool = False,
        advice: str = "use another --out, or --overwrite",
    ) -> None:
        self.folder, self.count, self.frames = Path(folder), len(made_by["prompts"]), frames
        if overwrite:
            self.delete_files()
        manifest = self.folder / MANIFEST
        if not manifest.exists():
            if images := self._files():
                raise UserError(f"{images[0]} is in the way (no {MANIFEST} beside it); use another --out")
            write_text(manifest, json.dumps(made_by, indent=1) + "\n")
        elif changed := self._differences(made_by):
            raise UserError(f"{folder}: holds images of another generation (other {', '.join(changed)}); {advice}")

    def file(self, index: int) -> Path:
        return self.folder / f"{index:04d}{'.png' if self.frames == 1 else '.webp'}"

    def missing(self) -> list[int]:
        """Numbers of the images that are not there yet."""
        return [index for index in range(self.count) if not self.file(index).exists()]

    def write(self, index: int, image: Tensor, text: str | None = None) -> None:
        """uint8 [H, W, 3], or a video [F, H, W, 3], with a text about it. Raises: UserError if the file cannot be
        written."""
        if self.frames == 1:
            write_image(to_pil(image), self.file(index), text)
        else:
            write_video(image, self.file(index), text)

    def read(self) -> Tensor:
        """All images, uint8 [N, H, W, 3], or videos [N, F, H, W, 3]. Raises: UserError if one cannot be read."""
        files = [self.file(index) for index in range(self.count)]
        if self.frames == 1:
            return torch.stack([read_image(file, _UNREADABLE) for file in files])
        return torch.stack([read_video(file, self.frames, _UNREADABLE) for file in files])

    def delete_files(self) -> None:
        """Delete the images and their manifest, and nothing else."""
        for path in [*self._files(), self.folder / MANIFEST]:
            with writing(path):
                path.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        return sorted(path for path in self.folder.iterdir() if _IMAGE.fullmatch(path.name) or is_partial(path))

    def _differences(self, made_by: Mapping[str, Any]) -> list[str]:
        """Names of what differs from the generation that the folder holds."""
        manifest = self.folder / MANIFEST
        with reading(manifest, "use --overwrite"):
            text = manifest.read_text(encoding="utf-8")
        try:
            found = dict(json.loads(text))
        except ValueError as error:
            raise read_error(manifest, error, "use --overwrite") from None
        wanted = json.loads(json.dumps(made_by))
        return [key for key in {**wanted, **found} if wanted.get(key) != found.get(key)]
