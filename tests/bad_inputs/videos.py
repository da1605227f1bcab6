"""Videos: numbers of frames, and what takes images alone."""

import json
from functools import partial
from pathlib import Path

from PIL import Image
from wan_setup import save_wan

from bad_inputs.table import Case, Message, Section

_WAN = {"wan": save_wan}
_SMALL = "--width 32 --height 32 --steps 1"


def _small_videos(path: Path) -> None:
    save_wan(path)
    (path / "fewstep.json").write_text(json.dumps({"steps": 1, "height": 32, "width": 32, "frames": 5}))


def _changed(file: str, path: Path, **values: object) -> None:
    save_wan(path)
    config = path / file
    config.write_text(json.dumps(json.loads(config.read_text()) | values))


SECTION = Section(
    "Videos",
    "Wan 2.1 makes videos, and images as videos of one frame.",
    (
        Message(
            "frames {count}: {pipeline} makes images alone; leave it out",
            "The model is of a family of images.",
            Case("generate tiny 'a fox' --frames 5", "frames 5: ZImagePipeline"),
            Case("plan micro-aligned -s teacher=tiny -s frames=5", "frames 5: ZImagePipeline"),
        ),
        Message(
            "frames {count} is not one more than a multiple of {number}; {count} and {count} are",
            "The first frame of a video has a latent frame of its own, each group of the others one.",
            Case(f"generate wan 'a fox' {_SMALL} --frames 6", "frames 6", _WAN),
        ),
        Message(
            "frames {count}: {part} takes images alone; set frames to 1",
            "Rewards, real images, votes and edits are of images.",
            Case(
                "generate wan 'a fox' --image a.png --frames 5",
                "frames 5: an edit",
                {**_WAN, "a.png": lambda path: Image.new("RGB", (32, 32)).save(path)},
            ),
        ),
        Message(
            "{folder}: makes videos of {count} frames, which are not served; set frames to 1 in its fewstep.json, or "
            "use fewstep generate",
            "The server makes images.",
            Case("serve wan", "videos of 5 frames", {"wan": _small_videos}),
        ),
        Message(
            "{file}: {key} {value} is not supported; only Wan 2.1 is",
            "Wan 2.2 has two transformers, or a noise level for each token.",
            Case(
                f"generate wan 'a fox' {_SMALL} --frames 1",
                "model_index.json: boundary_ratio 0.9",
                {"wan": partial(_changed, "model_index.json", boundary_ratio=0.9)},
            ),
        ),
        Message(
            "{folder}: it has patches of pixels, as Wan 2.2's; only Wan 2.1's is supported",
            "The autoencoder is another one.",
            Case(
                f"generate wan 'a fox' {_SMALL} --frames 1",
                "wan/vae",
                {"wan": partial(_changed, "vae/config.json", patch_size=2)},
            ),
        ),
        Message(
            "{folder}: {key} has {count} numbers; its latents have {count} channels",
            "Each channel of a latent has a mean and a deviation.",
            Case(
                f"generate wan 'a fox' {_SMALL} --frames 1",
                "wan/vae: latents_std",
                {"wan": partial(_changed, "vae/config.json", latents_std=[1.0])},
            ),
        ),
    ),
)
