"""Packs a trained micro teacher for publication: half-precision files, its best guidance scale, and a model card."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file

from fewstep.atomic import write_tensors, write_text
from fewstep.config.load import read_yaml
from fewstep.config.sections import PromptSettings
from fewstep.data.prompts import open_prompts
from fewstep.emoji.model_card import sample_grid, write_card, write_loss_curve
from fewstep.emoji.scorer import EmojiScorer
from fewstep.emoji.teacher_quality import beside_real_images, best_guidance, by_split_and_language
from fewstep.errors import UserError
from fewstep.evaluation.feature_networks import open_features
from fewstep.evaluation.image_sets import ImageSets
from fewstep.evaluation.kept_images import PUBLISHED, KeptImages
from fewstep.evaluation.runner import DIVERSITY_PROMPTS, DIVERSITY_SEEDS
from fewstep.evaluation.settings import default_settings
from fewstep.models.pipeline import load
from fewstep.models.replaceable import check_replaceable
from fewstep.outputs import write_image
from fewstep.progress import ProgressBars
from fewstep.training.tracking import read_metrics

PUBLISHED_PROMPTS = 200


def convert_to_fp16(folder: Path) -> None:
    """Rewrite every safetensors file in fp16, which rounds weights less than bf16. Loading converts to fp32."""
    for file in folder.rglob("[!.]*.safetensors"):
        write_tensors(file, {name: weight.half() for name, weight in load_file(file).items()}, {"format": "pt"})


def publish(runs: list[Path], out: Path, prompts: int, model: Path | None = None) -> str:
    """Write a model, its card, loss curve, sample grid and quality.json to ``out``; returns the card's quality section.

    Args:
        runs: directories of the transformer's training stages, in order.
        prompts: prompts per row of the card's tables.
        model: the model's folder, where a later run trained its decoder; None is the last stage's.

    Raises:
        UserError: ``out`` cannot be written or holds other files than a model, or a run lacks its recipe or metrics.
    """
    check_replaceable(out)
    metrics, stages, steps = [], [], 0
    for run in runs:
        lines, recipe = read_metrics(run / "metrics.jsonl"), read_yaml(run / "recipe.yaml")
        if not lines:
            raise UserError(f"{run / 'metrics.jsonl'}: has no metrics; give directories of finished runs")
        metrics += [{**line, "step": steps + line["step"]} for line in lines]
        stages.append({"recipe": recipe, "steps": int(lines[-1]["step"]), "seconds": lines[-1]["seconds"]})
        steps = metrics[-1]["step"]
    pipeline = load(model or runs[-1] / "model", "cpu")
    guidance, tried = best_guidance(pipeline, prompts)
    pipeline.generation_config.guidance_scale = guidance
    pipeline.save(out)
    convert_to_fp16(out)
    pipeline = load(out, "cpu")  # the quality is that of the published weights

    quality = {
        "by_split": by_split_and_language(pipeline, guidance, prompts),
        "compared": beside_real_images(pipeline, guidance, prompts),
    }
    write_loss_curve(metrics, out / "loss.png")
    write_image(sample_grid(pipeline, guidance), out / "samples.png")
    section = write_card(out, pipeline, guidance, prompts, quality, tried, EmojiScorer().accuracy, stages)
    write_text(out / "quality.json", json.dumps({"guidance": tried, **quality}, indent=2) + "\n")
    publish_images(out)
    return section


def publish_images(model: Path) -> None:
    """Add to a teacher's folder its images of the first test prompts, for the evaluations of its students.

    Raises:
        UserError: there is no such model, or the folder cannot be written.
    """
    pipeline = load(model, "cpu")
    prompts = open_prompts(PromptSettings()).texts("test")[:PUBLISHED_PROMPTS]
    many = default_settings(pipeline)[0]
    with ProgressBars() as bars:
        ImageSets(
            *(prompts, 0, DIVERSITY_PROMPTS, DIVERSITY_SEEDS, open_features(), [], bars),
            kept=KeptImages(model / PUBLISHED),
            published=KeptImages(None),
        ).generated(many)
