"""The checkpoints of a LoRA training, and the prompts on which they are compared."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fewstep.config.load import load_recipe, wrong_kind
from fewstep.config.lora_recipe import LoraRecipe
from fewstep.data.training_set.reading import TrainingSet, read_training_set, resolve_training_set
from fewstep.errors import UserError
from fewstep.evaluation.prompts import read_test_prompts
from fewstep.models.components import BUNDLED_MODELS

#: Subjects, places and styles that most sets lack.
UNSEEN_PROMPTS = (
    "a red bicycle leaning against a brick wall",
    "a bowl of oranges on a wooden table, morning light",
    "a lighthouse on a cliff in a storm, oil painting",
    "a portrait of an old fisherman, black and white photograph",
    "a cat asleep on a stack of books",
    "a street in Tokyo at night, rain, neon signs",
    "a snowy forest with a small cabin, smoke from the chimney",
    "an astronaut riding a horse, watercolor",
    "a glass of water next to a blue notebook",
    "two children building a sandcastle on a beach",
    "a steam train crossing a stone bridge, aerial view",
    "a plate of sushi, close-up photograph",
    "a dragon over a medieval town, pencil drawing",
    "a yellow tulip in a white vase",
    "a mountain lake with reflections at sunrise",
    "a robot playing chess in a park",
)


@dataclass(frozen=True)
class LoraRun:
    """A finished or unfinished training.

    Attributes:
        files: the LoRA file of each saved step, in order.
        images: its training set.
    """

    folder: Path
    recipe: LoraRecipe
    files: dict[int, Path]
    images: TrainingSet


def read_run(folder: Path) -> LoraRun:
    """Read what is compared. Raises: UserError if it is no run of a LoRA, or has no checkpoint or training set."""
    file = folder / "recipe.yaml"
    if not file.is_file():
        raise UserError(f"{folder}: no run of fewstep lora train (no recipe.yaml)")
    recipe = load_recipe(file)
    if not isinstance(recipe, LoraRecipe):
        raise wrong_kind(recipe, str(file))
    if recipe.data.images is None:
        raise UserError(f"{folder}: trained on the model's own images; there is no training set to compare with")
    found = sorted((folder / "lora").glob(f"{recipe.name}-{'[0-9]' * 8}.safetensors"))
    if not found:
        raise UserError(f"{folder}: no checkpoint in {folder / 'lora'} yet; train.save_every and keep_files make some")
    cache = folder / "cache" if recipe.data.cache is None else Path(recipe.data.cache).expanduser()
    images = read_training_set(resolve_training_set(recipe.data.images, cache))
    if len(images.images) < 2:
        raise UserError(f"{recipe.data.images}: one image; distances among training images need at least 2")
    return LoraRun(folder, recipe, {int(one.stem[-8:]): one for one in found}, images)


def set_prompts(images: TrainingSet, count: int) -> list[str]:
    """At most ``count`` of a set's captions, evenly spread; none twice."""
    captions = list(dict.fromkeys(image.caption for image in images.images))
    count = min(count, len(captions))
    return [captions[index * len(captions) // count] for index in range(count)]


def unseen_prompts(source: str | None, model: str, images: TrainingSet, count: int) -> list[str]:
    """At most ``count`` prompts that are no captions of the set.

    Args:
        source: a prompt source or file; None is the test prompts of a bundled model, else ``UNSEEN_PROMPTS``.

    Raises:
        UserError: it cannot be read, or has fewer than two such prompts.
    """
    captions = {image.caption for image in images.images}
    if source is None and model not in BUNDLED_MODELS:
        texts = list(UNSEEN_PROMPTS)
    else:
        texts = read_test_prompts(source, count + len(captions), model=model)
    found = [text for text in dict.fromkeys(texts) if text not in captions][:count]
    if len(found) < 2:
        raise UserError(f"--prompts {source}: at least 2 prompts that are no captions of the set, got {len(found)}")
    return found
