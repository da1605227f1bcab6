"""What single model families do not have."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from flux2_setup import save_flux2
from lumina2_setup import save_lumina2
from omni_setup import save_omni
from PIL import Image
from sd3_setup import save_sd3

from bad_inputs.table import Case, Message, Section

_SD3, _LUMINA = {"sd3": save_sd3}, {"lumina2": save_lumina2}
_OMNI = {"omni": save_omni}
_SMALL = "--width 64 --height 64 --steps 1"


def _photo(width: int, height: int) -> Callable[[Path], None]:
    return lambda path: Image.new("RGB", (width, height)).save(path)


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
        Message(
            "{folder}: {pipeline} does not edit images by instruction; give a model of {pipeline}",
            "`--edit` is for Z-Image-Omni and Z-Image-Edit; other models begin from an image with `--image`.",
            Case("generate tiny 'make it snow' --edit a.png", "ZImagePipeline", {"a.png": _photo(64, 64)}),
        ),
        Message(
            "{file}: {pipeline} edits images by instruction alone: fewstep generate with --edit FILE",
            "Such a model is not trained or exported here.",
            Case("generate omni 'a fox'", "omni/model_index.json: ZImageOmniPipeline", _OMNI),
            Case("convert omni --to original --out a.safetensors", "omni/model_index.json: ZImageOmniPipeline", _OMNI),
        ),
        Message(
            "{option}: has no effect with --edit; leave it out",
            "diffusers' pipeline for such models has no place for it.",
            Case("generate omni 'make it snow' --edit a.png --strength 0.5", "--strength", _OMNI),
        ),
        Message(
            "{option}: has no effect with a model that edits by instruction; leave it out",
            "A server of such a model has no LoRA files, no other VAE and no revised prompts.",
            Case("serve omni --lora-dir .", "--lora-dir", _OMNI),
            Case("serve omni --vae tiny", "--vae", _OMNI),
            Case("serve omni --enhancer own --replicas 1", "--enhancer", _OMNI),
        ),
        Message(
            "{count} images to edit: give 1 to {count}",
            "Each image makes every step slower.",
            Case(f"generate omni 'make it snow'{' --edit a.png' * 5}", "5 images", _OMNI),
        ),
        Message(
            "{file}: Image too small: {size}. Both dimensions must be at least {pixels}px",
            "diffusers' pipeline takes no smaller ones: enlarge the image.",
            Case("generate omni 'make it snow' --edit a.png", "a.png", {**_OMNI, "a.png": _photo(64, 32)}),
        ),
        Message(
            "{file}: Aspect ratio too extreme: {size} (ratio: {ratio}). Maximum allowed ratio is {ratio}",
            "Crop the image.",
            Case("generate omni 'make it snow' --edit a.png", "a.png", {**_OMNI, "a.png": _photo(64, 640)}),
        ),
        Message(
            "sampler sde: edits by instruction are sampled with euler; set sampler to euler",
            "diffusers' pipeline for such models has no other sampler.",
            Case(
                "generate omni 'make it snow' --edit a.png --sampler sde",
                "sampler sde",
                {**_OMNI, "a.png": _photo(64, 64)},
            ),
        ),
        Message(
            "{file}: siglip_feat_dim {value} is not supported; give that of siglip's features",
            "The transformer of such a model takes features of images.",
            Case(
                "generate omni 'make it snow' --edit a.png",
                "omni/transformer/config.json: siglip_feat_dim null",
                {"omni": partial(save_omni, siglip_feat_dim=None), "a.png": _photo(64, 64)},
            ),
        ),
        Message(
            "{folder}: its features have {count} numbers, the transformer takes {count}",
            "The SigLIP2 encoder is not that of the transformer.",
            Case(
                "generate omni 'make it snow' --edit a.png",
                "omni/siglip: its features",
                {"omni": partial(save_omni, siglip_feat_dim=24), "a.png": _photo(64, 64)},
            ),
        ),
        Message(
            "fp8: weights of a model that edits by instruction are in fp32 or bf16",
            "Leave `--dtype` out.",
            Case("generate omni 'make it snow' --edit a.png --dtype fp8", "fp8", {**_OMNI, "a.png": _photo(64, 64)}),
        ),
    ),
)
