"""Teacher, student and fake: three full copies, or one frozen base with a LoRA stack for each of the two that learn."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from fewstep.config.recipe import DistillRecipe
from fewstep.config.student_schedule import student_timesteps
from fewstep.core import flow
from fewstep.core.dtensor import full_state_dict
from fewstep.core.precision import uses_bf16
from fewstep.errors import UserError
from fewstep.models.adapters import (
    AdapterDenoiser,
    adapter_parameters,
    adapter_state_dict,
    add_adapter,
    capture_adapter_state,
    write_merged,
)
from fewstep.models.components import load_component, resolve_model
from fewstep.models.generation_config import GenerationConfig
from fewstep.models.parallel import shard_denoiser
from fewstep.models.pipeline import TextToImagePipeline, load
from fewstep.models.quantize import is_fp8, quantize_fp8_
from fewstep.models.zimage.denoiser import ZImageDenoiser
from fewstep.training.distributed import DistContext

LORA = "lora"  # where a run keeps its student's stack, beside the student


@dataclass
class Models:
    """The models of a distillation.

    Attributes:
        teacher: frozen.
        student: generates as the student of that moment; its denoiser learns.
        fake: learns too.
        shared: whether they share a base.
        teacher_folder: where the teacher is from.
        stacks: rank, scale and targets of each LoRA stack on it.
    """

    teacher: TextToImagePipeline
    student: TextToImagePipeline
    fake: nn.Module
    shared: bool
    teacher_folder: str
    stacks: dict[str, tuple[int, float, list[str]]] = field(default_factory=dict)

    def save(self, folder: Path, dist: DistContext) -> Path:
        """The student as an ordinary diffusers folder; where it is a LoRA stack, merged, and the stack beside it as
        ``lora/pytorch_lora_weights.safetensors``. The first process writes."""
        transformer = self.student.transformer if dist.world_size == 1 else self._put_together()
        write = None
        if dist.is_main_process and self.shared:
            lora = adapter_state_dict(transformer, "student")
            ZImagePipeline.save_lora_weights(folder.parent / LORA, transformer_lora_layers=lora)
            base = self._whole_base()
            write = lambda inner: write_merged(inner, transformer, "student", base)  # noqa: E731
        if dist.is_main_process:
            with_transformer(self.student, transformer, self.student.generation_config).save(folder, write)
        dist.barrier()
        return folder

    def _whole_base(self) -> ZImageTransformer2DModel | None:
        """What the student's stack is added to where the base is in 8 bits: the teacher as it is on disk."""
        if not is_fp8(self.teacher.transformer):
            return None
        return load_component(resolve_model(self.teacher_folder), "transformer", torch.bfloat16)

    def _put_together(self) -> ZImageTransformer2DModel:
        """The sharded transformer as a plain one."""
        sharded = self.student.transformer
        plain = ZImageTransformer2DModel.from_config(sharded.config)
        if self.shared:
            for name, (rank, scale, targets) in self.stacks.items():
                add_adapter(plain, name, rank, scale, targets)
        plain.load_state_dict(full_state_dict(sharded))
        return plain


def build_models(recipe: DistillRecipe, teacher: TextToImagePipeline, dist: DistContext | None = None) -> Models:
    """The roles as the recipe wants them; student and fake start as the teacher, or the student as ``init``. With
    several processes they are sharded.

    Raises:
        UserError: ``init`` does not fit.
    """
    card, dist = student_generation_config(recipe, teacher), dist or DistContext()
    mesh = dist.mesh(recipe.train.fsdp_shard_size) if dist.world_size > 1 else None
    base = recipe.roles.base
    if mesh is not None and (base == "fp8" or (base == "bf16" and recipe.roles.kind == "lora")):
        raise UserError(
            f"roles.base {base}: FSDP shards weights of one precision together; with several processes take fp32, or "
            "bf16 with roles.kind copies"
        )
    if recipe.roles.kind == "copies":
        # each is sharded before the next is made: three whole ones need not fit
        student = with_transformer(teacher, copy.deepcopy(teacher.transformer).float(), card)
        if recipe.init is not None:
            load_init(student, recipe.init)
        _prepare(student.denoiser.requires_grad_(True), recipe, mesh)
        fake = ZImageDenoiser(copy.deepcopy(teacher.transformer).float()).requires_grad_(True)
        _prepare(fake, recipe, mesh)
        if recipe.roles.base == "fp8":
            quantize_fp8_(teacher.transformer)
        _prepare(teacher.denoiser, recipe, mesh, learns=False)
        return Models(teacher, student, fake, shared=False, teacher_folder=recipe.teacher)

    roles = recipe.roles
    fake_rank = roles.fake_rank or roles.rank
    if recipe.fake_follow and fake_rank != roles.rank:
        raise UserError("fake_follow: student and fake need LoRA stacks of the same rank")
    stacks = {name: (rank, roles.scale, roles.targets) for name, rank in (("student", roles.rank), ("fake", fake_rank))}
    for name, (rank, scale, targets) in stacks.items():
        add_adapter(teacher.transformer, name, rank, scale, targets)
    if recipe.init is not None:
        load_adapter(teacher.transformer, roles.scale, recipe.init)
    if roles.base == "fp8":
        quantize_fp8_(teacher.transformer)
    if recipe.compile:
        teacher.denoiser.compile_repeated_blocks()
    if recipe.gradient_checkpointing:
        teacher.denoiser.enable_gradient_checkpointing(capture_adapter_state)
    if mesh is not None:
        shard_denoiser(teacher.denoiser, mesh, uses_bf16(recipe.train.precision, dist.device))
    student = with_transformer(teacher, teacher.transformer, card)
    student.denoiser = AdapterDenoiser(teacher.denoiser, "student")  # type: ignore[assignment]  # it can all that is asked here
    return Models(teacher, student, AdapterDenoiser(teacher.denoiser, "fake"), True, recipe.teacher, stacks)


def _prepare(denoiser: ZImageDenoiser, recipe: DistillRecipe, mesh: DeviceMesh | None, learns: bool = True) -> None:
    """Compiles, checkpoints and shards a denoiser as the recipe wants it."""
    if recipe.compile:
        denoiser.compile_repeated_blocks()
    if recipe.gradient_checkpointing and learns:
        denoiser.enable_gradient_checkpointing()
    if mesh is not None:
        shard_denoiser(denoiser, mesh, uses_bf16(recipe.train.precision, denoiser.transformer.device))


def with_transformer(model: TextToImagePipeline, transformer: nn.Module, card: GenerationConfig) -> TextToImagePipeline:
    """The model with another transformer and card; the frozen parts are shared."""
    return TextToImagePipeline(transformer, model.vae, model.text_encoder, model.tokenizer, model.scheduler, card)  # type: ignore[arg-type]


def student_generation_config(recipe: DistillRecipe, teacher: TextToImagePipeline) -> GenerationConfig:
    """How the few-step model that is to come wants to be run."""
    anchors = student_timesteps(recipe)
    return GenerationConfig(
        steps=len(anchors),
        guidance_scale=0.0,
        guidance_distilled=True,
        sigmas=flow.sigmas_from_timesteps(anchors, teacher.shift),
        sampler=recipe.student.sampler,
        eta=recipe.student.eta,
        system_prompt=teacher.generation_config.system_prompt,
        teacher=recipe.teacher,
        height=teacher.generation_config.height,
        width=teacher.generation_config.width,
    )


def load_init(student: TextToImagePipeline, path_or_name: str) -> None:
    """Give the student the weights of another model of the same architecture.

    Raises:
        UserError: its transformer has other shapes.
    """
    try:
        student.transformer.load_state_dict(load(path_or_name).transformer.state_dict())
    except RuntimeError as error:
        raise UserError(f"init: {path_or_name} is not of the teacher's architecture ({error})".split("\n")[0]) from None


def load_adapter(transformer: nn.Module, scale: float, student: str) -> None:
    """Give the student's LoRA stack the weights of the one that an earlier run saved beside its student.

    Raises:
        UserError: there is none, or it is of another rank or on other layers.
    """
    file = Path(student).parent / LORA / "pytorch_lora_weights.safetensors"
    try:
        found = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"init: {file} cannot be read ({error}); with roles.kind lora a student starts from that of a run with "
            "LoRA roles, because all roles share the teacher's weights"
        ) from None
    wanted = {key.replace(".student.", "."): p for key, p in adapter_parameters(transformer, "student").items()}
    given = {key.removeprefix("transformer."): tensor for key, tensor in found.items()}
    shapes = [{key: tuple(tensor.shape) for key, tensor in each.items()} for each in (wanted, given)]
    if shapes[0] != shapes[1]:
        raise UserError(f"init: {file} is of another rank than the recipe's stack, or on other layers")
    with torch.no_grad():
        for key, parameter in wanted.items():
            parameter.copy_(given[key] / scale if "lora_B" in key else given[key])  # the file has the scale in B
