"""What an image was made with, written into its file, so that it can be made again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Self

from pydantic import Field, ValidationError

from fewstep.config.base import PlainValues
from fewstep.config.explain import explain
from fewstep.errors import UserError
from fewstep.inference.image_extras import Extras
from fewstep.inference.params import ResolvedParams, SamplingParams
from fewstep.models.fingerprint import model_fingerprint
from fewstep.outputs import read_image_text


class ImageMetadata(PlainValues):
    """The settings of one image. The file holds them as JSON: PNG in a text chunk named "fewstep", JPEG and WebP in the
    EXIF field ImageDescription."""

    format: int = Field(1, ge=1, le=1, description="Version of this layout.")
    model: str = Field(description="The model's folder, hub id or bundled name, as its user wrote it.")
    model_fingerprint: str = Field(description="Of its components: it recognizes the model wherever it is.")
    dtype: str | None = Field(None, description="Of the weights; None is the stored one.")
    prompt: str
    params: SamplingParams = Field(description="All sampling parameters, none open, with the image's own seed.")
    extras: Extras = Field(default=Extras(), description="Files besides the model; the prompt before it was revised.")

    @classmethod
    def of(
        cls,
        model: str,
        fingerprint: str,
        prompt: str,
        params: ResolvedParams,
        seed: int,
        dtype: str | None = None,
        extras: Extras | None = None,
    ) -> Self:
        """The metadata of one image.

        Args:
            params: of all images that were made together.
            seed: of this one.
        """
        whole = params.model_dump() | {"seed": seed, "seeds": None, "batch_size": None}
        whole["eta"] = params.eta if params.sampler == "sde" else None  # it has no effect on the other
        return cls(
            model=model,
            model_fingerprint=fingerprint,
            dtype=dtype,
            prompt=prompt,
            params=SamplingParams.model_validate(whole),
            extras=extras or Extras(),
        )

    def dump(self) -> str:
        """JSON in ASCII, which all image formats hold."""
        whole = self.model_dump(mode="json", exclude={"params": {"seeds", "batch_size", "auto_steps"}})
        whole["extras"] = {key: value for key, value in whole["extras"].items() if value}
        return json.dumps({key: value for key, value in whole.items() if key != "extras" or value})

    def check_model(self, folder: Path) -> None:
        """Raises: UserError if the model in ``folder`` is not the one that made the image."""
        if model_fingerprint(folder) != self.model_fingerprint:
            raise UserError(f"{folder}: is not the model that made the image ({self.model}); give that model's folder")


def read_metadata(file: str | Path) -> ImageMetadata:
    """The metadata of an image that fewstep wrote. Raises: UserError if it has none, or it cannot be read."""
    text = read_image_text(file)
    if text is None:
        raise UserError(f"{file}: holds no settings of fewstep; give a single image that `fewstep generate` wrote")
    try:
        return ImageMetadata.model_validate_json(text)
    except ValidationError as error:
        raise UserError(f"{file}: its settings cannot be used: {explain(error, {}, ImageMetadata)}") from None
