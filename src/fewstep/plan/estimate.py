"""What a distillation will need, before any weight is loaded: memory by component, forwards, arithmetic, time.

The roles are made on torch's meta device, where tensors have shapes and no contents, and the method's own losses are
run there, with their backward passes (``rehearsal.py``): what is alive at the worst moment is counted
(``footprint.py``).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from fewstep.config.recipe import DistillRecipe
from fewstep.config.sections import OptimSettings
from fewstep.errors import UserError
from fewstep.models.components import resolve_model
from fewstep.models.pipeline import TextToImagePipeline
from fewstep.models.text import MAX_TOKENS_PER_BATCH
from fewstep.plan.communication import ParamCounts, forward_counts
from fewstep.plan.dry_run import DryRun, bytes_of, meta_models, meta_teacher

#: Teachers whose configuration ships, so that they can be planned for before they are downloaded.
KNOWN = {
    f"Tongyi-MAI/{name}": Path(__file__).parent.parent / "assets" / "zimage" for name in ("Z-Image", "Z-Image-Turbo")
}

STEP = "in a step"


@dataclass(frozen=True)
class GPUSpec:
    """bytes: of memory. flops: dense matrix products a second in bf16, as the maker states them."""

    bytes: float
    flops: float


GPUS = {
    "rtx3090": GPUSpec(24e9, 71e12),
    "rtx4090": GPUSpec(24e9, 165e12),
    "rtx5090": GPUSpec(32e9, 210e12),
    "l40s": GPUSpec(48e9, 362e12),
    "a100-40": GPUSpec(40e9, 312e12),
    "a100-80": GPUSpec(80e9, 312e12),
    "h100": GPUSpec(80e9, 989e12),
    "h200": GPUSpec(141e9, 989e12),
    "b200": GPUSpec(192e9, 2250e12),
}
ASSUMED_MFU = 0.4  # of the stated rate, in the times that are printed: a guess, and said to be one

#: What can be turned on to need less, in the order in which it is proposed.
MEMORY_OPTIONS = (
    "gradient_checkpointing=true",
    "roles.base=bf16",
    "roles.kind=lora",
    "roles.base=fp8",
    "optim.student.optimizer=adamw8bit",
    "optim.fake.optimizer=adamw8bit",
)


@dataclass
class Plan:
    """What a distillation needs of each GPU.

    Attributes:
        moments: bytes by component at each time that may be the worst, by what is done then.
        forwards, backwards: of denoisers in a step, mean over the anchors.
        flops: floating point operations of a step.
    """

    parameters: int
    height: int
    width: int
    moments: dict[str, dict[str, float]] = field(default_factory=dict)
    forwards: float = 0.0
    backwards: float = 0.0
    flops: float = 0.0

    @property
    def total(self) -> float:
        return max(sum(parts.values()) for parts in self.moments.values())

    @property
    def memory(self) -> dict[str, float]:
        """What a step takes, by component."""
        return self.moments[STEP]

    def fits(self, gpu: GPUSpec) -> bool:
        """Whether there is a twentieth to protect."""
        return self.total < 0.95 * gpu.bytes


def plan(recipe: DistillRecipe, gpus: int = 1, kind: Literal["cuda", "cpu"] = "cuda") -> Plan:
    """The plan of a recipe: of each of ``gpus`` GPUs, which share the weights.

    Args:
        kind: of device, whose kernels and autocast are reckoned with.

    Raises:
        UserError: there is no such teacher, or its configuration cannot be read.
    """
    teacher = meta_teacher(recipe, KNOWN.get(recipe.teacher) or resolve_model(recipe.teacher))
    card, whole = teacher.generation_config, bytes_of(teacher.transformer)
    text_encoder = {"text encoder": bytes_of(teacher.text_encoder), "what its layers say": _encoding(teacher)}
    found = Plan(_count(teacher.transformer), card.height, card.width)
    layout = ParamCounts.of(teacher.denoiser)
    roles = meta_models(recipe, teacher)
    made = {"student": _count(roles.student.denoiser), "fake": _count(roles.fake)}
    learn = dict(made)
    if recipe.method != "dmd" or not (recipe.shield.enabled and recipe.shield.weight):
        learn.pop("fake")
    optims = {name: getattr(recipe.optim, name) for name in learn}
    bf16 = recipe.train.precision != "fp32" if kind == "cuda" else recipe.train.precision == "bf16"

    base = "base" if roles.shared else "teacher"
    stacks = sum(made.values()) * 4.0 if roles.shared else 0.0
    weights = {
        base: bytes_of(teacher.transformer) - stacks,
        **{f"{name}'s {'adapters' if roles.shared else 'weights'}": 4.0 * count for name, count in made.items()},
    }
    states = {
        "gradients": 4.0 * max(learn.values()),
        **{f"{name}'s AdamW": count * _moments(optims[name]) for name, count in learn.items()},
        **{
            f"{name}'s moving average": 4.0 * count
            for name, count in learn.items()
            if optims[name].ema_decay is not None
        },
    }
    shared = {name: bytes / gpus for name, bytes in {**weights, **states}.items() if bytes}
    if gpus > 1:
        shared["gathered"] = (2.0 if bf16 else 4.0) * (2 * layout.block + layout.root)
        if bf16:  # what is gathered is in bf16 already
            for module in (roles.student.denoiser, roles.fake):
                nn.Module.to(module, torch.bfloat16)
    with torch.random.fork_rng(devices=[]):  # the losses draw noise
        rehearsal = DryRun(recipe, roles, -(-recipe.train.batch_size // gpus), kind, bf16)
        found.moments = {
            "while the teacher is loaded": {"teacher": whole} | (text_encoder if recipe.asks_teacher_first else {}),
            "while prompts are encoded": {name: bytes / gpus for name, bytes in weights.items()} | text_encoder,
            STEP: shared | rehearsal.step(learn),
            "while previews are drawn": shared | rehearsal.preview(),
        }
        flops = rehearsal.flops()
    if not roles.shared:  # a copy, before it is shared out
        copies = 4.0 * found.parameters * (1 + (len(made) - 1) / gpus)
        found.moments["while roles are made"] = {"teacher": whole, "copies": copies}
    if recipe.method == "dmd":
        step = forward_counts(recipe.student.steps, recipe.fake_updates if "fake" in learn else 0)
        found.forwards, found.backwards = step.forwards, step.backwards
        more = 2  # the teacher's one call has three times the batch
    else:
        found.forwards, found.backwards, more = recipe.student.steps, recipe.student.steps, 0
    again = found.backwards if recipe.gradient_checkpointing else 0
    found.flops = (
        flops * (found.forwards + more + 2 * found.backwards + again) * recipe.train.gradient_accumulation_steps
    )
    return found


def _encoding(teacher: TextToImagePipeline) -> float:
    """Bytes of what the text encoder's layers say of the tokens that it is asked at once."""
    config = teacher.text_encoder.config
    return (
        MAX_TOKENS_PER_BATCH * config.hidden_size * (config.num_hidden_layers + 1) * teacher.text_encoder.dtype.itemsize
    )


def parse_gpu(text: str) -> GPUSpec:
    """A GPU's name, or its memory such as "24GB". Raises: UserError."""
    if text.lower() in GPUS:
        return GPUS[text.lower()]
    try:
        return GPUSpec(float(text.lower().removesuffix("gb")) * 1e9, 0.0)
    except ValueError:
        raise UserError(f"--gpu {text}: give a size such as 24GB, or one of {', '.join(GPUS)}") from None


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _moments(optim: OptimSettings) -> float:
    """Bytes of AdamW's two moments for a parameter; of 8 bits, with a scale for every 256."""
    return 8.0 if optim.optimizer == "adamw" else 2 * (1 + 4 / 256)
