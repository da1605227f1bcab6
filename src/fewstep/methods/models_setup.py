"""Teacher, student and further trainable copies: full copies, or one frozen base with a LoRA adapter for each."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from fewstep.config.recipe import DistillRecipe
from fewstep.core import flow
from fewstep.core.compiler import check_compiler, compiles
from fewstep.core.dtensor import full_state_dict
from fewstep.core.method import Shard
from fewstep.core.precision import uses_bf16
from fewstep.errors import UserError
from fewstep.methods.student_init import LORA, load_adapters, load_init
from fewstep.models.adapter_files import adapter_state_dict, write_merged
from fewstep.models.adapters import AdapterDenoiser, add_adapter, copy_adapter, is_adapter_key
from fewstep.models.components import load_component, resolve_model
from fewstep.models.context_parallel import ContextParallel
from fewstep.models.denoiser import TransformerDenoiser
from fewstep.models.generation_config import GenerationConfig
from fewstep.models.linear_layers import matching_linears
from fewstep.models.parallel import shard_denoiser
from fewstep.models.pipeline import TextToImagePipeline
from fewstep.models.quantize import is_fp8, quantize_fp8_
from fewstep.models.step_adapters import STEP_LORAS, StepAdapterDenoiser, step_adapters
from fewstep.training.distributed import DistContext
from fewstep.training.optim import check_optimizer

STUDENT = "student"


class Prepare(Protocol):
    """Compiles, checkpoints, divides and shards a denoiser as a recipe says."""

    def __call__(self, denoiser: TransformerDenoiser, trained: bool = True) -> None: ...


@dataclass(frozen=True)
class AdapterSpec:
    """A LoRA adapter: it adds ``(alpha / rank) B A``."""

    rank: int
    alpha: float
    target_modules: list[str]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclass
class Models:
    """The models of a distillation.

    Attributes:
        teacher: frozen.
        student: generates with the student's present weights; its denoiser is trained.
        extra: further trained copies of the teacher by name, such as "fake_score".
        copies: frozen copies of the student as it is when the training begins, by name.
        shares_base: whether they are adapters on one base.
        teacher_path: where the teacher was loaded from.
        adapters: of student, extra models and copies, by name.
    """

    teacher: TextToImagePipeline
    student: TextToImagePipeline
    extra: dict[str, nn.Module]
    shares_base: bool
    teacher_path: str
    adapters: dict[str, AdapterSpec] = field(default_factory=dict)
    copies: dict[str, nn.Module] = field(default_factory=dict)

    def save(self, folder: Path, dist: DistContext) -> Path:
        """The student as an ordinary diffusers folder; a LoRA student is merged, with its adapter beside it as
        ``lora/pytorch_lora_weights.safetensors``, or has a LoRA for each step in it. The main process writes."""
        transformer = self.student.transformer if dist.world_size == 1 else self.gather_full_model()
        write = None
        if dist.is_main_process and self.shares_base:
            write = partial(self._write_adapters, folder, transformer)
        if dist.is_main_process:
            self.student.with_transformer(transformer, self.student.generation_config).save(folder, write)
        dist.barrier()
        return folder

    def _write_adapters(self, folder: Path, transformer: nn.Module, inner: Path) -> None:
        """Write the student's transformer to ``inner``, in its ``folder`` as that is being made."""
        family, base = self.teacher.family, self._unquantized_base()
        if isinstance(self.student.denoiser, StepAdapterDenoiser):
            write_merged(inner, transformer, {}, base)
            for step, name in enumerate(self.student.denoiser.names, start=1):
                family.write_lora(inner.parent / STEP_LORAS / str(step), adapter_state_dict(transformer, name))
            return
        family.write_lora(folder.parent / LORA, adapter_state_dict(transformer, STUDENT))
        write_merged(inner, transformer, {STUDENT: 1.0}, base)

    def _unquantized_base(self) -> nn.Module | None:
        """The weights that the student's adapter is merged into where the base is in fp8: the teacher's on disk."""
        if not is_fp8(self.teacher.transformer):
            return None
        return load_component(resolve_model(self.teacher_path), "transformer", torch.bfloat16)

    def gather_full_model(self) -> nn.Module:
        """The student's sharded transformer as a plain one. Of a base in fp8 it has the adapters alone, on a base
        without weights."""
        sharded = self.student.transformer
        quantized = is_fp8(sharded)
        with torch.device("meta") if quantized else nullcontext():
            plain = self.teacher.family.build("transformer", sharded.config)
            for name, spec in self.adapters.items():
                add_adapter(plain, name, spec.rank, spec.alpha, target_modules=spec.target_modules)
        if quantized:
            own = {key: tensor for key, tensor in sharded.state_dict().items() if is_adapter_key(key)}
            plain.load_state_dict(own, strict=False, assign=True)
        else:
            plain.load_state_dict(full_state_dict(sharded))
        return plain


def check_models(recipe: DistillRecipe, teacher: TextToImagePipeline) -> None:
    """Find what :func:`build_models` would refuse, before any data is made for them.

    Raises:
        UserError: an ending in ``models.target_modules`` matches no layer, there is no compiler, or the transformer
            cannot be divided among ``models.context_parallel`` processes.
    """
    if recipe.models.train == "lora" and recipe.models.target_modules is not None:
        matching_linears(teacher.transformer, recipe.models.target_modules, "models.target_modules")
    if recipe.models.compile is True:
        check_compiler(teacher.device, "models.compile")
    if recipe.models.context_parallel > 1:
        teacher.denoiser.check_context_parallel(recipe.models.context_parallel)


def build_models(
    recipe: DistillRecipe,
    teacher: TextToImagePipeline,
    extra: Sequence[str] = (),
    dist: DistContext | None = None,
    copies: Sequence[str] = (),
) -> Models:
    """The models of a recipe; all start as the teacher, or the student as ``init``. Several processes shard them.

    Args:
        extra: names of further trained copies of the teacher.
        copies: names of frozen copies of the student.

    Raises:
        UserError: ``init`` does not fit, or several processes cannot train the recipe.
    """
    dist, settings = dist or DistContext(), recipe.models
    check_processes(recipe, dist.world_size)
    mesh = dist.mesh(recipe.train.fsdp_shard_size) if dist.world_size > 1 else None
    context = ContextParallel(dist.context_mesh["ring", "ulysses"]) if dist.context_parallel > 1 else None
    prepare = partial(_prepare, recipe, mesh, context)
    if settings.train == "full":
        return _full_copies(recipe, teacher, extra, copies, prepare)
    return _adapters(recipe, teacher, extra, copies, prepare)


def check_processes(recipe: DistillRecipe, count: int) -> None:
    """Check that ``count`` processes can train a recipe together.

    Raises:
        UserError: batches that cannot be divided, or an optimizer that works with one process only.
    """
    if count % recipe.models.context_parallel:
        raise UserError(
            f"models.context_parallel {recipe.models.context_parallel} does not divide the number of processes, {count}"
        )
    if count == 1:
        return
    Shard(world_size=count // recipe.models.context_parallel).rows(recipe.train.batch_size)
    for part, optim in recipe.optim.items():
        check_optimizer(part, optim, count)


def _full_copies(
    recipe: DistillRecipe,
    teacher: TextToImagePipeline,
    extra: Sequence[str],
    copies: Sequence[str],
    prepare: Prepare,
) -> Models:
    # each is sharded before the next is made: all of them need not fit unsharded
    transformer = copy.deepcopy(teacher.transformer).float()
    student = teacher.with_transformer(transformer, student_generation_config(recipe, teacher), student=True)
    if recipe.init is not None:
        load_init(student, recipe.init)
    kept: dict[str, nn.Module] = {}
    for name in copies:
        kept[name] = frozen = teacher.family.denoiser(copy.deepcopy(transformer)).requires_grad_(False)
        prepare(frozen, trained=False)
    prepare(student.denoiser.requires_grad_(True))
    trained: dict[str, nn.Module] = {}
    for name in extra:
        denoiser = teacher.family.denoiser(copy.deepcopy(teacher.transformer).float()).requires_grad_(True)
        prepare(denoiser)
        trained[name] = denoiser
    if recipe.models.frozen_dtype == "fp8":
        quantize_fp8_(teacher.transformer, teacher.family.quantizable_modules)
    prepare(teacher.denoiser, trained=False)
    return Models(teacher, student, trained, shares_base=False, teacher_path=recipe.teacher, copies=kept)


def _adapters(
    recipe: DistillRecipe,
    teacher: TextToImagePipeline,
    extra: Sequence[str],
    copies: Sequence[str],
    prepare: Prepare,
) -> Models:
    settings, transformer = recipe.models, teacher.transformer
    alpha = settings.lora_alpha or settings.rank
    targets = settings.target_modules or list(teacher.family.lora_target_modules)
    student_spec = AdapterSpec(settings.rank, alpha, targets)
    extra_rank = settings.fake_score_rank or settings.rank
    steps = recipe.student.steps
    stacks = {name: step_adapters(name, steps) if settings.lora_per_step else [name] for name in (STUDENT, *copies)}
    specs = {each: student_spec for stack in stacks.values() for each in stack} | {
        name: AdapterSpec(extra_rank, student_spec.scale * extra_rank, targets) for name in extra
    }
    for name, spec in specs.items():
        add_adapter(transformer, name, spec.rank, spec.alpha, target_modules=spec.target_modules)
    if recipe.init is not None:
        load_adapters(transformer, stacks[STUDENT], student_spec.scale, recipe.init)
    for name in copies:
        for source, target in zip(stacks[STUDENT], stacks[name], strict=True):
            copy_adapter(transformer, source, target)
    if settings.frozen_dtype == "fp8":
        quantize_fp8_(transformer, teacher.family.quantizable_modules)
    prepare(teacher.denoiser)
    student = teacher.with_transformer(transformer, student_generation_config(recipe, teacher), student=True)
    sigmas = flow.sigmas_from_timesteps(recipe.student.levels, teacher.shift)

    def of(stack: Sequence[str]) -> AdapterDenoiser:
        if settings.lora_per_step:
            return StepAdapterDenoiser(teacher.denoiser, stack, sigmas)
        return AdapterDenoiser(teacher.denoiser, dict.fromkeys(stack, 1.0))

    student.denoiser = of(stacks[STUDENT])  # type: ignore[assignment]
    trained: dict[str, nn.Module] = {name: AdapterDenoiser(teacher.denoiser, {name: 1.0}) for name in extra}
    kept: dict[str, nn.Module] = {name: of(stacks[name]) for name in copies}
    return Models(teacher, student, trained, True, recipe.teacher, specs, kept)


def _prepare(
    recipe: DistillRecipe,
    mesh: DeviceMesh | None,
    context: ContextParallel | None,
    denoiser: TransformerDenoiser,
    trained: bool = True,
) -> None:
    """Compile, checkpoint, divide and shard a denoiser as the recipe says."""
    if compiles(recipe.models.compile, denoiser.transformer.device) and context is None:
        denoiser.compile_repeated_blocks()
    if recipe.models.gradient_checkpointing and trained:
        denoiser.enable_gradient_checkpointing()
    if context is not None:
        denoiser.enable_context_parallel(context)
    if mesh is not None:
        shard_denoiser(denoiser, mesh, uses_bf16(recipe.train.precision, denoiser.transformer.device))


def student_generation_config(recipe: DistillRecipe, teacher: TextToImagePipeline) -> GenerationConfig:
    """How the few-step student is sampled."""
    student, config = recipe.student, teacher.generation_config
    return GenerationConfig(
        steps=student.steps,
        step_counts=student.step_counts and sorted(set(student.step_counts)),
        guidance_scale=0.0,
        guidance_distilled=True,
        sigmas=flow.sigmas_from_timesteps(student.levels, teacher.shift),
        sampler=student.sampler,
        eta=student.eta,
        step_loras=recipe.models.lora_per_step,
        system_prompt=config.system_prompt,
        teacher=recipe.teacher,
        height=config.height,
        width=config.width,
        frames=config.frames,
    )
