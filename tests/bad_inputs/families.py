"""What single model families do not have."""

from functools import partial

from flux2_setup import save_flux2
from lumina2_setup import save_lumina2
from sd3_setup import save_sd3

from bad_inputs.table import Case, Message, Section

_SD3, _LUMINA = {"sd3": save_sd3}, {"lumina2": save_lumina2}
_SMALL = "--width 64 --height 64 --steps 1"

SECTION = Section(
    "Model families",
    "[Add a model family](../guides/add-a-family.md) says what a family may leave out.",
    (
        Message(
            "{width} x {height}: this transformer has positions for sides of at most {pixels} pixels",
            "Stable Diffusion 3's positions end there: make smaller images.",
            Case("generate sd3 'a fox' --width 256 --height 256 --steps 1", "256 x 256", _SD3),
        ),
        Message(
            "{file}: time_shift_type {type} is not supported; only exponential is",
            "FLUX.2's noise levels are shifted by the size of the image, as its own pipeline does it.",
            Case(
                f"generate flux2 'a fox' {_SMALL}",
                "flux2/scheduler/scheduler_config.json: time_shift_type 'linear'",
                {"flux2": partial(save_flux2, time_shift_type="linear")},
            ),
        ),
        Message(
            "aot: {denoiser} cannot be compiled ahead of time; use compile",
            "`--compile` compiles the blocks of every family, when they are first used.",
            Case("export lumina2 --aot --out model.pt2", "Lumina2Denoiser", _LUMINA),
        ),
        Message(
            "cache {method}: {denoiser} cannot reuse layers; leave it out",
            "Z-Image alone reuses layers between steps.",
            Case(f"generate sd3 'a fox' {_SMALL} --cache taylor:2", "SD3Denoiser", _SD3),
        ),
        Message(
            "attention {backend}: {pipeline} has PyTorch's alone; leave it out",
            "The family's transformer calls PyTorch's attention directly.",
            Case(f"generate sd3 'a fox' {_SMALL} --attention-backend native", "StableDiffusion3Pipeline", _SD3),
            Case(f"generate lumina2 'a fox' {_SMALL} --attention-backend native", "Lumina2Pipeline", _LUMINA),
        ),
    ),
)
