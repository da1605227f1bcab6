"""Where `fewstep generate` puts its images or videos: one file each in a folder, or one grid in a file."""

from __future__ import annotations

import math
import shutil
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from fewstep.cli.options import Dtype
from fewstep.data.images import grid, grid_size, strip_length
from fewstep.errors import UserError
from fewstep.inference.editing import first_step
from fewstep.inference.generate import GeneratedBatch
from fewstep.inference.image_extras import Extras
from fewstep.inference.image_folder import ImageFolder, generation_manifest
from fewstep.inference.image_metadata import ImageMetadata
from fewstep.inference.params import SamplingParams
from fewstep.models.components import resolve_model
from fewstep.models.fingerprint import path_fingerprint
from fewstep.models.generation_config import load_generation_config
from fewstep.outputs import check_image, claimed_folder, names_folder, read_image_text, write_animation, write_image


class Target:
    """The output of one command, checked before the model is loaded.

    Images are written as they are made, into the folder, or, for a grid, into a hidden one beside its file, which is
    deleted when the grid is written.

    Args:
        out: as the user wrote it; a folder's name may end with a slash.
        model: its name or folder.
        columns: of the grid; None is a square.
        extras: of all images.
        originals: the prompts before they were revised; None where they were not.

    Raises:
        UserError: a file or folder that cannot be written, columns for a folder, or a picture that its format cannot
            hold.
    """

    def __init__(
        self,
        out: str,
        prompts: Sequence[str],
        params: SamplingParams,
        model: str,
        dtype: Dtype | None,
        columns: int | None,
        overwrite: bool,
        extras: Extras | None = None,
        originals: Sequence[str] | None = None,
    ) -> None:
        self.path, self.is_grid = Path(out), not names_folder(out)
        self.prompts, self.params, self.overwrite = list(prompts), params, overwrite
        if columns is not None and not self.is_grid:
            raise UserError(f"--columns: no effect on the folder {out}, which gets one file an image; leave it out")
        self.columns = columns or math.ceil(math.sqrt(len(prompts)))
        if self.is_grid:
            check_image(self.path)  # a wrong ending is reported before a model is looked for
        source = resolve_model(model)
        self.model, self.dtype = model, dtype.value if dtype else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # loading the model gives them again
            self.resolved = params.resolved(load_generation_config(source))
        if self.resolved.strength is not None:
            first_step(self.resolved.steps, self.resolved.strength)
        self.fingerprint = path_fingerprint(source) or ""
        if self.is_grid:
            height, width, frames = self.resolved.size
            width *= 1 if self.is_animated else strip_length(frames)
            check_image(self.path, *grid_size(len(prompts), self.columns, height, width))
        self.extras, self.originals = extras or Extras(), originals
        self.made_by = generation_manifest(source, prompts, params, self.dtype, self.extras)
        self.evaluations, self.seconds = 0, 0.0

    @property
    def is_animated(self) -> bool:
        """Whether the file shows videos, in a format that can; a picture shows strips of their frames."""
        return self.resolved.frames > 1 and self.path.suffix.lower() == ".webp"

    @property
    def folder(self) -> Path:
        """Where the images are written as they are made."""
        return self.path.with_name(f".{self.path.name}.images") if self.is_grid else self.path

    @contextmanager
    def claimed(self) -> Iterator[Self]:
        """Inside, this process alone writes here. An interruption says how many images are kept.

        Raises:
            UserError: another process is using it, or it holds images of another generation.
        """
        with claimed_folder(self.folder):
            self.images = self._open()
            self.missing = self.images.missing()
            try:
                yield self
            except KeyboardInterrupt:
                done = len(self.prompts) - len(self.images.missing())
                raise KeyboardInterrupt(
                    f"interrupted; {done} of {len(self.prompts)} images are in {self.folder}; the same command makes "
                    "the others"
                ) from None
            finally:
                if self.is_grid and len(self.images.missing()) == len(self.prompts):
                    shutil.rmtree(self.folder, ignore_errors=True)  # nothing worth keeping

    def _open(self) -> ImageFolder:
        try:
            return ImageFolder(self.folder, self.made_by, frames=self.resolved.frames, overwrite=self.overwrite)
        except UserError as other:
            if not self.is_grid:
                raise
            warnings.warn(f"unfinished images are deleted: {other}", stacklevel=2)
            return ImageFolder(self.folder, self.made_by, frames=self.resolved.frames, overwrite=True)

    def remaining(self) -> tuple[list[str], SamplingParams]:
        """The prompts of the missing images, and the parameters that give each the seed of its place."""
        all_seeds = self.params.image_seeds(len(self.prompts))
        seeds = tuple(all_seeds[index] for index in self.missing)
        return [self.prompts[index] for index in self.missing], self.params.model_copy(update={"seeds": seeds})

    def fill(self, batches: Iterable[GeneratedBatch]) -> None:
        """Write the images of each batch when it is made. Raises: UserError if a file cannot be written."""
        for batch in batches:
            for index, image in zip(batch.indices, batch.images, strict=True):
                self.images.write(self.missing[index], image, self.text(self.missing[index], batch.steps))
            self.evaluations += batch.nfe * len(batch.images)
            self.seconds += batch.seconds

    def text(self, index: int, steps: int) -> str:
        """What an image was made with in so many steps, for its file."""
        seed = self.params.image_seeds(len(self.prompts))[index]
        extras = self.extras
        if self.originals is not None and self.originals[index] != self.prompts[index]:
            extras = extras.model_copy(update={"original_prompt": self.originals[index]})
        params = self.resolved.model_copy(update={"steps": steps})
        return ImageMetadata.of(
            self.model, self.fingerprint, self.prompts[index], params, seed, self.dtype, extras
        ).dump()

    def finish(self) -> str:
        """Write the grid, if there is one; returns a line about the images."""
        replaced = self.is_grid and self.path.exists()
        if self.is_grid:
            text = read_image_text(self.images.file(0)) if len(self.prompts) == 1 else None
            made_images = self.images.read()
            if self.is_animated:
                frames = [grid(frame, self.columns) for frame in made_images.unbind(1)]
                write_animation(frames, self.path, text)
            else:
                write_image(grid(made_images, self.columns), self.path, text)
            shutil.rmtree(self.folder, ignore_errors=True)
        made, count = len(self.missing), len(self.prompts)
        kind = "image" if self.resolved.frames == 1 else "video"
        line = f"{self.path}: {count} {kind}s"
        if made:
            line += f", NFE {self.evaluations / made:g}, {self.seconds / made:.3f} s per {kind}"
        if made < count:
            line += f"; {count - made} of them were made earlier"
        return line + ("; an earlier file was replaced" if replaced else "")
