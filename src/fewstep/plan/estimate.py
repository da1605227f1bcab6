"""The plan of a distillation, before any weight is loaded: memory by component, passes, arithmetic.

The models are created on torch's meta device, where the losses of the method run with their backward passes
(``dry_run.py``), and the live tensors are counted (``memory_tracker.py``).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from fewstep.config.recipe import DistillRecipe
from fewstep.methods.models_setup import Models, check_processes
from fewstep.models.components import resolve_model
from fewstep.plan.communication import ParamCounts
from fewstep.plan.costs import bytes_of, count_parameters, encoding_bytes, label, state_bytes
from fewstep.plan.dry_run import DryRun, meta_models, meta_teacher
from fewstep.plan.gpus import GPUSpec
from fewstep.plan.memory_tracker import DeviceType

#: Teachers with bundled configuration files, so that they can be planned for before they are downloaded.
_ASSETS = Path(__file__).parent.parent / "assets"
BUNDLED_CONFIGS = {
    "Tongyi-MAI/Z-Image": _ASSETS / "zimage",
    "Tongyi-MAI/Z-Image-Turbo": _ASSETS / "zimage",
    "Alpha-VLLM/Lumina-Image-2.0": _ASSETS / "lumina2",
    "stabilityai/stable-diffusion-3.5-medium": _ASSETS / "sd35-medium",
    "black-forest-labs/FLUX.2-klein-base-4B": _ASSETS / "klein-4b",
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": _ASSETS / "wan-1.3b",
}

#: Titles of the peaks.
LOADING, COPYING, ENCODING = "loading the teacher", "copying the models", "encoding prompts"
TRAJECTORIES = "sampling the teacher's trajectories"
STEP, PREVIEW, EVALUATION = "training step", "sampling previews", "evaluation at the end"

#: Components of a training step that are divided among the GPUs that share each sample.
OF_SAMPLES = ("saved activations", "temporaries")

BASE = "base"  # the weights that LoRA adapters share

#: Settings that save memory, in the order in which they are suggested.
MEMORY_OPTIONS = (
    "models.gradient_checkpointing=true",
    "models.frozen_dtype=bf16",
    "models.train=lora",
    "models.frozen_dtype=fp8",
)


@dataclass
class Plan:
    """What a distillation needs of each GPU.

    Attributes:
        peaks: bytes by component, for each part of the run that may need most.
        forwards, backwards: passes of all denoisers in a step, mean over the anchors.
        flops: floating point operations of a step.
    """

    parameters: int
    height: int
    width: int
    peaks: dict[str, dict[str, float]] = field(default_factory=dict)
    forwards: float = 0.0
    backwards: float = 0.0
    flops: float = 0.0
    frames: int = 1

    @property
    def total(self) -> float:
        """Bytes of the largest peak."""
        return max(sum(rows.values()) for rows in self.peaks.values())

    @property
    def memory(self) -> dict[str, float]:
        """Bytes of a training step, by component."""
        return self.peaks[STEP]

    def fits(self, gpu: GPUSpec) -> bool:
        """Whether at least 5% of the memory remains free."""
        return self.total < 0.95 * gpu.bytes


def plan(recipe: DistillRecipe, gpus: int = 1, device_type: DeviceType = "cuda") -> Plan:
    """The plan of a recipe for each of ``gpus`` GPUs that shard the weights. With ``models.context_parallel`` the
    memory of samples is divided evenly; what each GPU holds of all tokens is left out.

    Args:
        device_type: whose kernels and autocast are emulated.

    Raises:
        UserError: there is no such teacher, its configuration cannot be read, or so many GPUs cannot train the recipe.
    """
    check_processes(recipe, gpus)
    shared = recipe.models.context_parallel
    teacher = meta_teacher(recipe, BUNDLED_CONFIGS.get(recipe.teacher) or resolve_model(recipe.teacher))
    if shared > 1:
        teacher.denoiser.check_context_parallel(shared)
    config, teacher_bytes = teacher.generation_config, bytes_of(teacher.transformer)
    encoding = encoding_bytes(teacher)
    counts = ParamCounts.of(teacher.denoiser)
    found = Plan(counts.parameters, config.height, config.width, frames=config.frames)
    models = meta_models(recipe, teacher)
    bf16 = recipe.train.precision != "fp32" if device_type == "cuda" else recipe.train.precision == "bf16"

    weights = _weights(models)

    def sharing(name: str) -> int:
        """The GPUs that share it: LoRA adapters and their optimizers are whole on each."""
        return gpus if name == BASE or not models.shares_base else 1

    if gpus > 1 and bf16 and not models.shares_base:  # all-gathered weights are in bf16: autocast makes no copies
        for module in (models.student.denoiser, *models.extra.values(), *models.copies.values()):
            nn.Module.to(module, torch.bfloat16)
    with torch.random.fork_rng(devices=[]):  # the losses draw noise
        dry_run = DryRun(recipe, models, -(-recipe.train.batch_size * shared // gpus), device_type, bf16)
        trained = {part.name: count_parameters(part.module) for part in dry_run.method.trainables}
        states = state_bytes(recipe.optim, trained)
        held = {name: size / sharing(name) for name, size in {**weights, **states}.items() if size}
        # a term's own parts, such as a discriminator, are whole on each GPU
        own = trained.keys() - {"student", *models.extra}
        held |= {f"{label(name)} weights": 4.0 * trained[name] for name in sorted(own)}
        held |= dry_run.method.frozen_bytes()
        if recipe.method.trained_rewards():  # images are decoded in every step
            held["VAE"] = bytes_of(models.teacher.vae)
        if gpus > 1:
            held["all-gather buffers"] = (2.0 if bf16 else 4.0) * (2 * counts.block + counts.root)
        found.peaks = {
            LOADING: {"teacher": teacher_bytes} | encoding,
            ENCODING: {name: size / sharing(name) for name, size in weights.items()} | encoding,
            STEP: held | {name: size / (shared if name in OF_SAMPLES else 1) for name, size in dry_run.step().items()},
            PREVIEW: held | dry_run.preview(),
        }
        if recipe.method.samples_teacher and recipe.trajectory.cache is None:
            found.peaks[TRAJECTORIES] = {"teacher": teacher_bytes} | dry_run.trajectories()
        if recipe.evaluate.enabled:  # the student is loaded as it is stored, the teacher in its dtype
            merged = models.shares_base and recipe.models.frozen_dtype != "fp32"
            dtype = torch.bfloat16 if merged else torch.float32
            whole = {
                name: float(counts.parameters * dtype.itemsize)
                for name in ("teacher", "student", *recipe.evaluate.compare)
            }
            found.peaks[EVALUATION] = whole | dry_run.evaluation(dtype)
        flops = dry_run.flops() / shared
    if not models.shares_base:  # one whole copy, before it is sharded
        found.peaks[COPYING] = {
            "teacher": teacher_bytes,
            "copies": 4.0 * counts.parameters * (1 + (len(models.extra) + len(models.copies)) / gpus),
        }
    passes = dry_run.passes
    found.forwards, found.backwards = passes.forwards, passes.backwards
    recomputed = found.backwards if recipe.models.gradient_checkpointing else 0
    batches = passes.forward_batches + 2 * found.backwards + recomputed
    found.flops = flops * batches * recipe.train.gradient_accumulation_steps
    return found


def _weights(models: Models) -> dict[str, float]:
    """Bytes of all weights: adapters and trainable copies are fp32."""
    trained = {"student": models.student.denoiser, **models.extra, **models.copies}
    sizes = {name: 4.0 * count_parameters(module) for name, module in trained.items()}
    transformer = bytes_of(models.teacher.transformer)
    if models.shares_base:
        base = {BASE: transformer - sum(sizes.values())}
        return base | {f"{label(name)} adapter": size for name, size in sizes.items()}
    return {"teacher": transformer} | {f"{label(name)} weights": size for name, size in sizes.items()}
