"""The files besides the model that `fewstep generate` makes images with: from its options, or those of an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fewstep.errors import UserError
from fewstep.inference.edit_input import EditInput, read_edit_files
from fewstep.inference.image_extras import Extras, UsedFile, used_loras
from fewstep.inference.image_metadata import ImageMetadata
from fewstep.models.other_vae import vae_folder


@dataclass(frozen=True)
class InputFiles:
    """Attributes:
    loras: LoRA files or folders with their strengths.
    ignored: keys of these files that are left out.
    vae: folder in place of the model's own.
    image, mask: of an edit.
    references: images that a model edits by instruction.
    """

    loras: Mapping[str, float]
    ignored: Sequence[str] = ()
    vae: str | None = None
    image: str | None = None
    mask: str | None = None
    references: Sequence[str] = ()

    def or_recorded(self, metadata: ImageMetadata, source: str) -> InputFiles:
        """What is not given is as it was for an image.

        Args:
            source: that image, for messages.

        Raises:
            UserError: a file is not there any more, or has changed.
        """
        made = metadata.extras
        if metadata.params.strength is not None and self.image is None and made.image is None:
            raise UserError(f"{source}: was made from another image, which it does not hold; give --image FILE")
        recorded = Extras() if self.loras else made
        loras = {used.checked(source, f"--lora FILE:{used.strength:g}"): used.strength for used in recorded.loras}
        image, mask = self.image, self.mask
        if image is None and made.image is not None:
            image = _recorded(made.image, source, "--image FILE")
            mask = mask or _recorded(made.mask, source, "--image FILE --mask FILE")
        return InputFiles(
            self.loras or loras,
            [*self.ignored, *recorded.ignored_keys],
            self.vae or _recorded(made.vae, source, "--vae FOLDER"),
            image,
            mask,
            self.references or [used.checked(source, "--edit FILE for each image") for used in made.references],
        )

    def extras(self) -> Extras:
        """For the images' files. Raises: UserError if one is not there."""
        return Extras(
            loras=used_loras(self.loras),
            ignored_keys=tuple(self.ignored),
            vae=None if self.vae is None else UsedFile.of(str(vae_folder(self.vae))),
            image=None if self.image is None else UsedFile.of(self.image),
            mask=None if self.mask is None else UsedFile.of(self.mask),
            references=tuple(UsedFile.of(file) for file in self.references),
        )

    def edit_input(self, strength: float | None, size: tuple[int | None, int | None]) -> EditInput | None:
        """The image and mask of an edit. Raises: UserError if they cannot be read, or options need another one."""
        if self.image is not None:
            return read_edit_files(self.image, self.mask, size)
        for option, given in (("--mask", self.mask), ("--strength", strength)):
            if given is not None:
                raise UserError(f"{option}: an edit begins from an image; give --image FILE")
        return None


def _recorded(used: UsedFile | None, source: str, option: str) -> str | None:
    """The path of a recorded file. Errors as for :meth:`UsedFile.checked`."""
    return None if used is None else used.checked(source, option)
