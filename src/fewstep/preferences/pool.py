"""The images of a comparison: one folder for each model, filled before the first vote, continued where it stopped."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path

import torch

from fewstep.data.preferences import Candidate
from fewstep.errors import UserError
from fewstep.inference.generate import GenerationStep, generate_batches
from fewstep.inference.image_folder import ImageFolder, generation_manifest
from fewstep.models.frames import check_one_frame
from fewstep.models.pipeline import load
from fewstep.preferences.contenders import Contender
from fewstep.preferences.schedule import Comparison
from fewstep.progress import Advance, ProgressBars

IMAGES = "images"


def image_name(label: str, prompt: int) -> str:
    """The path of an image, relative to the folder of the votes."""
    return f"{IMAGES}/{label}/{prompt:04d}.png"


def candidates(comparison: Comparison) -> tuple[Candidate, Candidate]:
    """Its left and its right image."""
    left, right = (
        Candidate(model=label, image=image_name(label, comparison.prompt))
        for label in (comparison.left, comparison.right)
    )
    return left, right


def generate_images(
    folder: str | Path,
    contenders: Sequence[Contender],
    prompts: Sequence[str],
    comparisons: Sequence[Comparison],
    device: str | torch.device = "auto",
) -> int:
    """Make the images of the comparisons that are not there yet, as PNG; returns how many those were.

    Image i of every model has the prompt i and, unless a model names another seed, the seed ``seed + i``. One model is
    loaded at a time, and none whose images are all there.

    Raises:
        UserError: the folder holds images of another generation, or an error of loading or sampling.
        KeyboardInterrupt: with a message for the user; images that were made are kept.
    """
    folder = Path(folder)
    needed = {one.label: sorted(_prompts_of(one.label, comparisons)) for one in contenders}
    folders = {one.label: _open(folder / IMAGES / one.label, one, prompts) for one in contenders}
    missing = {label: [i for i in numbers if not folders[label].file(i).exists()] for label, numbers in needed.items()}
    total = sum(map(len, missing.values()))
    try:
        with ProgressBars() as bars:
            for one in contenders:
                if missing[one.label]:
                    advance = bars.add(f"sampling steps of {one.label}", one.steps * len(missing[one.label]))
                    _generate(one, prompts, missing[one.label], folders[one.label], device, advance)
                    gc.collect()  # a pipeline has cycles; the next one needs its memory
                    if torch.cuda.is_available():
                        torch.cuda.empty_cache()
    except KeyboardInterrupt:
        left = sum(not folders[label].file(i).exists() for label, numbers in missing.items() for i in numbers)
        raise KeyboardInterrupt(
            f"interrupted; {total - left} of {total} missing images were made; the same command makes the others"
        ) from None
    return total


def _generate(
    one: Contender,
    prompts: Sequence[str],
    numbers: Sequence[int],
    images: ImageFolder,
    device: str | torch.device,
    advance: Advance,
) -> None:
    seeds = one.params.image_seeds(len(prompts))
    params = one.params.model_copy(update={"seeds": tuple(seeds[i] for i in numbers)})

    def count(step: GenerationStep) -> None:
        advance(len(step.images))

    try:
        model = load(one.model, device)
        check_one_frame(one.params.frames or model.generation_config.frames, "a vote")
        for batch in generate_batches(model, [prompts[i] for i in numbers], params, count):
            for index, image in zip(batch.indices, batch.images, strict=True):
                images.write(numbers[index], image)
    except UserError as error:
        raise UserError(f"{one.label}: {error}") from None


def _open(folder: Path, one: Contender, prompts: Sequence[str]) -> ImageFolder:
    folder.mkdir(parents=True, exist_ok=True)
    made_by = generation_manifest(one.folder, prompts, one.params)
    return ImageFolder(folder, made_by, advice="use another --out, or another label")


def _prompts_of(label: str, comparisons: Sequence[Comparison]) -> set[int]:
    return {each.prompt for each in comparisons if label in (each.left, each.right)}
