"""A ComfyUI workflow that samples a model as fewstep does.

It is in ComfyUI's API format, which its page opens too. Sigmas are listed one by one: a student's need not be those of
a scheduler.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fewstep.models.generation_config import GenerationConfig

#: fewstep's samplers with ``eta`` 1 in ComfyUI; "lcm" draws all noise anew after each step.
SAMPLERS = {"euler": "euler", "sde": "lcm"}


@dataclass(frozen=True)
class WorkflowFiles:
    """Names of files below ComfyUI's folders of models.

    Attributes:
        gguf: whether transformer and text encoder are GGUF, which the custom nodes ComfyUI-GGUF open.
    """

    transformer: str
    text_encoder: str
    vae: str
    gguf: bool


def comfyui_workflow(
    files: WorkflowFiles, config: GenerationConfig, sigmas: Sequence[float], shift: float, clip_type: str
) -> dict[str, Any]:
    """The nodes by their IDs, each with its class and inputs; ``["3", 0]`` is the first output of node 3."""
    loader = "GGUF" if files.gguf else ""
    transformer: Mapping[str, Any] = {"unet_name": files.transformer}
    if not files.gguf:
        transformer = {**transformer, "weight_dtype": "default"}
    nodes: list[tuple[str, Mapping[str, Any]]] = [
        (f"UnetLoader{loader}" if files.gguf else "UNETLoader", transformer),
        (f"CLIPLoader{loader}", {"clip_name": files.text_encoder, "type": clip_type}),
        ("VAELoader", {"vae_name": files.vae}),
        ("ModelSamplingAuraFlow", {"model": ["1", 0], "shift": shift}),
        ("CLIPTextEncode", {"clip": ["2", 0], "text": "a fox in the snow"}),
        ("CLIPTextEncode", {"clip": ["2", 0], "text": ""}),
        ("EmptySD3LatentImage", {"width": config.width, "height": config.height, "batch_size": 1}),
        ("KSamplerSelect", {"sampler_name": SAMPLERS[config.sampler]}),
        ("ManualSigmas", {"sigmas": ", ".join(f"{sigma:.6f}" for sigma in sigmas)}),
        (
            "SamplerCustom",
            {
                "model": ["4", 0],
                "add_noise": True,
                "noise_seed": 0,
                "cfg": config.guidance_scale + 1,
                "positive": ["5", 0],
                "negative": ["6", 0],
                "sampler": ["8", 0],
                "sigmas": ["9", 0],
                "latent_image": ["7", 0],
            },
        ),
        ("VAEDecode", {"samples": ["10", 0], "vae": ["3", 0]}),
        ("SaveImage", {"images": ["11", 0], "filename_prefix": "fewstep"}),
    ]
    return {
        str(number): {"class_type": name, "inputs": dict(inputs)}
        for number, (name, inputs) in enumerate(nodes, start=1)
    }
