"""The frames of a video in its latent: the first is alone, the others are compressed in groups."""

from __future__ import annotations

from fewstep.errors import UserError
from fewstep.models.family import Components, ModelFamily


def check_one_frame(frames: int, what: str) -> None:
    """Raises: UserError for videos where there is something that takes images alone.

    Args:
        what: that is, and the key or option that named it.
    """
    if frames > 1:
        raise UserError(f"frames {frames}: {what} takes images alone; set frames to 1")


def latent_frames(family: ModelFamily, components: Components, frames: int) -> tuple[int, ...]:
    """The dimension of frames of a latent: (1 + (F - 1) / multiple,) for a video of F, () in a family of images.

    Args:
        frames: of the video; 1 is an image.

    Raises:
        UserError: the family makes images, or has no latent of so many frames.
    """
    multiple = family.frame_multiple(components)
    if multiple is None:
        if frames > 1:
            raise UserError(f"frames {frames}: {family.pipeline_class} makes images alone; leave it out")
        return ()
    more = (frames - 1) % multiple
    if more:
        fewer = frames - more
        raise UserError(
            f"frames {frames} is not one more than a multiple of {multiple}; {fewer} and {fewer + multiple} are"
        )
    return (1 + (frames - 1) // multiple,)
