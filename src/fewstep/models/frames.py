"""The frames of a video in its latent: the first is alone, the others are compressed in groups."""

from __future__ import annotations

from fewstep.errors import UserError
from fewstep.models.family import Components, ModelFamily


def add_frames(family: ModelFamily, components: Components, shape: tuple[int, ...], frames: int) -> tuple[int, ...]:
    """The shape of the latent of a video.

    Args:
        shape: of the latent of one of its frames, (C, rows, columns).
        frames: of the video; 1 is an image.

    Returns:
        (C, latent frames, rows, columns), or ``shape`` in a family of images.

    Raises:
        UserError: the family makes images, or has no latent of so many frames.
    """
    multiple = family.frame_multiple(components)
    if multiple is None and frames > 1:
        raise UserError(f"frames {frames}: {family.pipeline_class} makes images alone; leave it out")
    if multiple is None:
        return shape
    more = (frames - 1) % multiple
    if more:
        raise UserError(
            f"frames {frames} is not one more than a multiple of {multiple}; {frames - more} and "
            f"{frames - more + multiple} are"
        )
    channels, *sides = shape
    return channels, 1 + (frames - 1) // multiple, *sides
