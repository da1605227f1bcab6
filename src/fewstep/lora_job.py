"""The composition root of LoRA training: a recipe becomes a training set, models, a method and a trainer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fewstep.config.lora_recipe import LoraRecipe
from fewstep.config.sections import PromptSettings
from fewstep.core.device import log_device
from fewstep.core.registry import lora_methods
from fewstep.core.seeds import generator
from fewstep.data.prompts import open_prompts
from fewstep.data.training_set.batches import alternating_batches, example_batches
from fewstep.data.training_set.encoded import Example, encode_captions, encode_set, on_device
from fewstep.data.training_set.reading import TrainingSet, read_training_set, resolve_training_set
from fewstep.errors import UserError
from fewstep.inference.own_images import own_examples
from fewstep.inference.params import SamplingParams
from fewstep.jobs import make_preview
from fewstep.methods.lora.base import LoraMethod, LoraModels, LoraSetup
from fewstep.methods.lora.models_setup import LORA, LoraFiles, build_lora_models, frozen_dtype, without_adapters
from fewstep.models.components import load_component, resolve_model
from fewstep.models.generation_config import load_generation_config
from fewstep.models.lora.merge import is_few_step
from fewstep.models.lora.metadata import TrainedOn, lora_metadata
from fewstep.models.lora.targets import targets_of
from fewstep.models.lora.trained import adapter_updates
from fewstep.models.lora.write import write_lora
from fewstep.models.pipeline import TextToImagePipeline, load
from fewstep.models.same_latents import check_same_latents
from fewstep.models.step_adapters import check_one_transformer
from fewstep.models.vision_language import vision_language_folder
from fewstep.training.distributed import DistContext
from fewstep.training.run_dir import RunDir
from fewstep.training.trainer import Trainer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PREVIEW_IMAGES = 8


@dataclass(frozen=True)
class LoraInputs:
    """What a LoRA training reads before any model is loaded.

    Attributes:
        images: the training set; None where the model makes its own.
        captions: of own images, one for each; those beside the training set where there is one.
        files: the LoRA files that the recipe names.
        few_step: whether the model is a few-step one.
        vision_language: folder of the model that encodes images with their captions; None if the method needs none.
    """

    images: TrainingSet | None
    captions: list[str]
    files: LoraFiles
    few_step: bool
    vision_language: Path | None


def open_lora_inputs(recipe: LoraRecipe, cache: Path) -> LoraInputs:
    """Read and check all that a recipe names. No weight is loaded.

    Raises:
        UserError: a model, a file or the training set cannot be read, or does not fit the method.
    """
    folder = resolve_model(recipe.model)
    few_step = is_few_step(load_generation_config(folder))
    _check_method(recipe, few_step)
    teacher = recipe.method.teacher_model
    files = LoraFiles.read(recipe, folder, None if teacher is None else resolve_model(teacher))
    images, captions = None, list[str]()
    if recipe.data.images is not None:
        images = read_training_set(resolve_training_set(recipe.data.images, cache))
    own = recipe.data.preservation or recipe.data.own_images
    if own is not None:
        texts = open_prompts(PromptSettings(source=own.prompts)).texts("train")
        chosen = torch.randint(len(texts), (own.count,), generator=generator("own prompts", recipe.train.seed))
        captions = [texts[index] for index in chosen.tolist()]
    named = recipe.method.image_encoder
    vision_language = None if named is None else vision_language_folder(named)
    return LoraInputs(images, captions, files, few_step, vision_language)


def _check_method(recipe: LoraRecipe, few_step: bool) -> None:
    """Raises: UserError if the model is of another kind than the recipe needs."""
    guidance, teacher = recipe.preview.guidance_scale, recipe.method.teacher_model
    if few_step and guidance:
        raise UserError(
            f"preview.guidance_scale {guidance:g}: {recipe.model} is a distilled model, whose guidance is in its "
            "weights; guided again it overbakes, in training as in previews; leave it out"
        )
    if not few_step and (recipe.data.own_images is not None or recipe.method.added_lora is not None):
        key = "data.own_images" if recipe.data.own_images is not None else "method.training_adapter"
        raise UserError(f"{key}: {recipe.model} is a multi-step model, it has no distillation to undo; leave it out")
    if teacher is not None and is_few_step(load_generation_config(resolve_model(teacher))):
        raise UserError(
            f"method.teacher {teacher}: a distilled model has no guidance left to distill; name the multi-step model "
            "that the student was distilled from"
        )
    if recipe.method.few_step_only and not few_step:
        raise UserError(f"model {recipe.model}: no few-step model; for a multi-step one take method flow_matching")


def train_lora(recipe: LoraRecipe, run: RunDir, device: torch.device) -> Path:
    """Train a LoRA; write it as ``<run>/lora/<name>.safetensors``, and one beside it with each checkpoint.

    Resumes from the run's last checkpoint. Returns the file.

    Raises:
        UserError: see :func:`open_lora_inputs`; or the model or its parts do not fit the recipe.
    """
    check_one_transformer(resolve_model(recipe.model), "model")
    cache = run.directory / "cache" if recipe.data.cache is None else Path(recipe.data.cache).expanduser()
    inputs = open_lora_inputs(recipe, cache)
    model = load(recipe.model, "cpu", frozen_dtype(recipe.models))
    log_device(device)
    sides = recipe.data.resolutions or [inputs.images.resolution if inputs.images else model.generation_config.height]
    model.set_size(max(sides) // model.latent_multiple * model.latent_multiple, frames=1)
    teacher = None if recipe.method.teacher_model is None else _open_teacher(recipe, model)
    examples, captions = list[Example](), inputs.captions
    if inputs.images is not None:
        examples = encode_set(inputs.images, model, cache, recipe.data.resolutions, device, inputs.vision_language)
        captions = [one.caption for one in examples]
    features = encode_captions(inputs.captions, model, cache, device) if inputs.captions else []
    shown = recipe.preview.prompts or list(dict.fromkeys(captions))[:PREVIEW_IMAGES]
    with on_device(model.text_encoder, device):  # kept by the encoder: previews need the text encoder no more
        null = model.encoder.features(["", *shown])[0].cpu()

    torch.manual_seed(recipe.train.seed)  # of the adapters
    models = build_lora_models(recipe, model, device, teacher, inputs.files)
    model.enable_model_cpu_offload()
    own = list[Example]()
    if inputs.captions:
        source = teacher if teacher is not None and recipe.method.teacher_adapters else model
        with without_adapters(source):
            own = own_examples(source, inputs.captions, features, recipe.train.seed, cache)
    trainer = _make_trainer(recipe, run, inputs, models, (examples, own), null, shown)
    trainer.fit()
    with trainer.ema_weights():
        return _write(recipe, run, model, inputs, trainer.step, f"{recipe.name}.safetensors")


def _make_trainer(
    recipe: LoraRecipe,
    run: RunDir,
    inputs: LoraInputs,
    models: LoraModels,
    examples: tuple[Sequence[Example], Sequence[Example]],
    null: Tensor,
    shown: Sequence[str],
) -> Trainer:
    """
    Args:
        examples: of the training set, and the model's own images; one may be empty.
        null: features of the null prompt.
        shown: prompts of the previews.
    """
    train, model = recipe.train, models.model
    method_class: type[LoraMethod] = lora_methods.get(recipe.method.name)
    method = method_class.build(LoraSetup(recipe, models, model.encode([""]).to(model.device)))
    dropout = recipe.data.caption_dropout
    sources = [
        example_batches(each, null, train.batch_size, train.seed, dropout, model.device) for each in examples if each
    ]
    kept = recipe.data.preservation
    source = sources[0] if kept is None else alternating_batches(sources[0], sources[1], kept.fraction)

    def on_save(step: int) -> None:
        _write(recipe, run, model, inputs, step, f"{recipe.name}-{step:08d}.safetensors")
        written = sorted((run.directory / LORA).glob(f"{recipe.name}-{'[0-9]' * 8}.safetensors"))
        for old in written[: -recipe.keep_files]:
            old.unlink()

    return Trainer(
        *(method, source, run),
        train=train,
        optim=recipe.optim,
        preview=make_preview(model, shown, SamplingParams(guidance_scale=recipe.preview.guidance_scale)),
        on_save=on_save,
        dist=DistContext(device=model.device),
    )


def _open_teacher(recipe: LoraRecipe, model: TextToImagePipeline) -> TextToImagePipeline:
    """The method's second model, with the other components of ``model``. Raises: UserError if it does not fit them."""
    name = recipe.method.teacher_model
    assert name is not None
    folder = resolve_model(name)
    check_one_transformer(folder, "method.teacher")
    check_same_latents(model, folder, f"method.teacher: {name}")
    transformer = load_component(folder, "transformer", frozen_dtype(recipe.models))
    teacher = model.with_transformer(transformer, load_generation_config(folder))
    if model.family.prompt_features(teacher.components) != model.family.prompt_features(model.components):
        raise UserError(f"method.teacher: {name} takes other prompt features than {recipe.model}")
    return teacher


def _write(
    recipe: LoraRecipe, run: RunDir, model: TextToImagePipeline, inputs: LoraInputs, step: int, name: str
) -> Path:
    """Write the adapter with its present weights into ``<run>/lora``."""
    kind: TrainedOn = "student" if inputs.few_step else "base"
    own = f"{len(inputs.captions)} of its own images"
    images = own if inputs.images is None else f"{len(inputs.images.images)} images"
    if inputs.images is not None and inputs.captions:
        images += f" and {own}"
    metadata = lora_metadata(
        recipe.name,
        architecture=model.family.architecture,
        base_model=recipe.model,
        kind=kind,
        description=f"{recipe.method.name}, {step} steps, {images}",
        trigger=inputs.images.trigger if inputs.images else "",
        resolution=model.generation_config.height,
    )
    file = run.directory / LORA / name
    dtype = DTYPES[recipe.adapter.save_dtype]
    targets = targets_of(model.transformer, model.family)
    layout = "ai-toolkit" if recipe.adapter.kind == "lokr" else "diffusers"  # in which diffusers reads LoKr
    write_lora(file, adapter_updates(model.transformer, LORA), targets, layout, metadata, dtype)
    return file
