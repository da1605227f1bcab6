"""Compares the saved checkpoints of a LoRA training, and strengths of the recommended one; writes a report."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fewstep.atomic import write_text
from fewstep.errors import UserError
from fewstep.evaluation.applicability import applicable_scores, check_applicable
from fewstep.evaluation.cost import nfe
from fewstep.evaluation.feature_networks import open_features
from fewstep.evaluation.kept_images import KEPT, KeptImages
from fewstep.evaluation.lora_choice.candidates import LoraRun, read_run, set_prompts, unseen_prompts
from fewstep.evaluation.lora_choice.measured import Drawing, Drawn, all_figures, kept_name, real_figures, strength_name
from fewstep.evaluation.lora_choice.rule import Choice, Figures, Reference, choose
from fewstep.inference.params import parse_params
from fewstep.models.components import resolve_model
from fewstep.models.generation_config import load_generation_config
from fewstep.models.lora.bind import read_lora
from fewstep.models.lora.merge import is_few_step
from fewstep.models.lora.targets import model_targets
from fewstep.models.lora.weights import Lora
from fewstep.models.pipeline import TextToImagePipeline, load
from fewstep.outputs import check_file, check_folder
from fewstep.progress import ProgressBars, log_line
from fewstep.rewards.scorers import open_scorers

STRENGTHS = (0.4, 0.6, 0.8, 1.0, 1.2)
JSON, PAGE = "choice.json", "index.html"


@dataclass(frozen=True)
class Part:
    """One comparison: of checkpoints, or of strengths.

    Attributes:
        drawn, figures: by candidate, in the order of training or of strengths.
    """

    drawn: dict[str, Drawn]
    figures: dict[str, Figures]
    choice: Choice


@dataclass(frozen=True)
class Comparison:
    """
    Attributes:
        run: the training.
        prompts: of the set, then unseen ones; ``known``: how many of them are of the set.
        without: images without the LoRA.
        file, strength: what is recommended.
        settings: of the comparison, for the report.
    """

    run: LoraRun
    prompts: list[str]
    known: int
    without: Drawn
    reference: Reference
    checkpoints: Part
    strengths: Part
    file: Path
    strength: float
    settings: dict[str, Any]


@dataclass(frozen=True)
class ChoiceSettings:
    """
    Attributes:
        model: draws the images, such as the few-step model for a LoRA of its base; None is the one trained.
        prompts: source or file of unseen prompts; None as in :func:`unseen_prompts`.
        count: prompts of each kind.
        scorers: by name; None is every one that needs no checkpoint and applies.
        features: the feature network.
    """

    model: str | None = None
    prompts: str | None = None
    count: int = 32
    scorers: Sequence[str] | None = None
    features: str = "open-nsfw"
    seed: int = 0


def choose_checkpoint(folder: Path, out: Path, settings: ChoiceSettings, device: torch.device) -> Comparison:
    """Draw and measure every saved checkpoint of the run in ``folder``; write ``choice.json`` and ``index.html``.

    Finished images are kept in ``out`` until then, and the same call continues from them.

    Raises:
        UserError: it is no run with checkpoints, a file or the training set cannot be read, a scorer is unknown or
            applies to none of the prompts, or ``out`` cannot be written.
    """
    for name in (JSON, PAGE):
        check_file(out / name)
    check_folder(out / KEPT)
    parse_params({"seed": settings.seed})
    try:
        from fewstep.evaluation.lora_choice.report import write
    except ModuleNotFoundError as error:
        raise UserError(f"the report needs {error.name}; pip install 'fewstep[eval]'") from None
    if settings.model is not None:
        resolve_model(settings.model)  # a mistake here is reported at once
    run = read_run(folder)
    known = set_prompts(run.images, settings.count)
    drawn_with = settings.model or run.recipe.model
    unseen = unseen_prompts(settings.prompts, drawn_with, run.images, settings.count)
    opened = open_scorers(settings.scorers, device)
    if settings.scorers is not None:
        check_applicable(opened, unseen)
    scorers = [scorer for scorer in opened.values() if applicable_scores(scorer, unseen)]
    network = open_features(settings.features, device)
    base = resolve_model(drawn_with)
    targets, config = model_targets(base), load_generation_config(base)
    loras = {step: read_lora(file, targets) for step, file in run.files.items()}
    passes = nfe(config.steps, config.guidance_scale > 0 and not config.guidance_distilled)
    sets, images = len(loras) + len(STRENGTHS), len(known) + len(unseen)
    log_line(
        f"{len(loras)} checkpoints and {len(STRENGTHS) - 1} further strengths, {images} images each: at most "
        f"{sets * images} images, {sets * images * passes} forward passes"
    )
    if settings.model is None and not is_few_step(config):
        log_line(f"{drawn_with} is a multi-step model; if the LoRA is used on a few-step one, name that with --model")
    model = load(drawn_with, device)
    _set_resolution(model, run)
    kept = KeptImages(out / KEPT)
    drawing = Drawing(model, known, unseen, settings.seed, network, scorers, kept)
    real = real_figures(run.images, model.generation_config.height, network)
    found = _compare(drawing, run, loras, real, sets * images)
    about = {
        "model": drawn_with,
        "training images": len(run.images.images),
        "prompts of the set": len(known),
        "unseen prompts": len(unseen),
        "first seed": settings.seed,
        "features": network.name,
        "flexibility by": ", ".join(sorted(found[0].scores)) or "images without the LoRA",
        "device": str(device),
    }
    result = _result(run, [*known, *unseen], len(known), found, loras, about)
    write_text(out / JSON, json.dumps(as_json(result), indent=1, ensure_ascii=False) + "\n")
    write(out / PAGE, result)
    kept.delete()
    return result


def _set_resolution(model: TextToImagePipeline, run: LoraRun) -> None:
    """As in the training's previews."""
    sides = run.recipe.data.resolutions or [run.images.resolution]
    model.set_size(max(sides) // model.latent_multiple * model.latent_multiple, frames=1)


_Found = tuple[Drawn, Reference, Part, Part]


def _compare(
    drawing: Drawing, run: LoraRun, loras: dict[int, Lora], real: tuple[torch.Tensor, Figures], images: int
) -> _Found:
    """Images without the LoRA, what all is compared with, the checkpoints, and the strengths of the best."""
    digests = {step: _digest(file) for step, file in run.files.items()}
    with ProgressBars() as bars:
        advance = bars.add("images", images)

        def draw(step: int, strength: float) -> Drawn:
            name = kept_name(run.files[step], strength)
            return drawing(name, (loras[step], strength), digests[step], advance)

        without = drawing("without", None, "", advance)
        drawn = {f"step {step}": draw(step, 1.0) for step in loras}
        figures, reference = all_figures(drawing, drawn, without, real)
        checkpoints = Part(drawn, figures, choose(figures, reference))
        best = int(checkpoints.choice.best.removeprefix("step "))
        swept = {strength_name(each): drawn[f"step {best}"] if each == 1 else draw(best, each) for each in STRENGTHS}
    swept_figures, _ = all_figures(drawing, swept, without, real)
    by_distance = sorted(STRENGTHS, key=lambda strength: abs(strength - 1))  # of equal ones, that nearest to 1
    ordered = {strength_name(each): swept_figures[strength_name(each)] for each in by_distance}
    return without, reference, checkpoints, Part(swept, swept_figures, choose(ordered, reference))


def _result(
    run: LoraRun, prompts: list[str], known: int, found: _Found, loras: dict[int, Lora], about: dict[str, Any]
) -> Comparison:
    without, reference, checkpoints, strengths = found
    step = int(checkpoints.choice.best.removeprefix("step "))
    strength = float(strengths.choice.best.removeprefix("strength "))
    return Comparison(
        *(run, prompts, known, without, reference, checkpoints, strengths),
        *(run.files[step], strength, about),
    )


def as_json(result: Comparison) -> dict[str, Any]:
    """What ``choice.json`` has."""

    def part(one: Part) -> dict[str, Any]:
        rows = {
            name: asdict(figures)
            | {
                "score": result.reference.score(figures),
                "overbake": result.reference.overbake(figures),
                "sharpness": result.reference.sharpness(figures),
                "exceeded": result.reference.exceeded(figures),
                "scores": one.drawn[name].scores,
            }
            for name, figures in one.figures.items()
        }
        return {"best": one.choice.best, "runner_up": one.choice.runner_up, "reasons": one.choice.reasons} | {
            "figures": rows
        }

    return {
        "file": str(result.file),
        "strength": result.strength,
        "checkpoints": part(result.checkpoints),
        "strengths": part(result.strengths),
        "without": asdict(result.reference.without) | {"scores": result.without.scores},
        "training_images": asdict(result.reference.real),
        "prompts": {"set": result.prompts[: result.known], "unseen": result.prompts[result.known :]},
        "settings": result.settings,
    }


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "blake2b").hexdigest()
