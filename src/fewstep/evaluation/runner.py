"""Measures a model on fixed prompts and seeds, beside its teacher and beside real images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from fewstep.errors import UserError
from fewstep.evaluation.applicability import check_applicable
from fewstep.evaluation.cost import MIN_PROMPTS, affordable_prompts, evaluation_cost, expected_minutes, nfe
from fewstep.evaluation.feature_networks import DEFAULT, open_features
from fewstep.evaluation.image_sets import ImageSet, ImageSets
from fewstep.evaluation.kept_images import KEPT, Fingerprints, KeptImages
from fewstep.evaluation.metrics_file import Figures, Metrics, Samples, targets
from fewstep.evaluation.settings import TEACHER_STEPS, Setting, default_settings
from fewstep.inference.params import parse_params
from fewstep.models.pipeline import TextToImagePipeline
from fewstep.outputs import check_file, check_folder
from fewstep.progress import ProgressBars, log_line
from fewstep.rewards.protocol import Classifier, Scorer
from fewstep.rewards.scorers import open_scorers

REPORT_FILES = ("metrics.json", "grid.png", "index.html")
DIVERSITY_PROMPTS, DIVERSITY_SEEDS = 16, 4


def evaluate(
    model: TextToImagePipeline,
    *,
    prompts: Sequence[str],
    teacher: TextToImagePipeline | None = None,
    compare: Mapping[str, TextToImagePipeline] | None = None,
    settings: Sequence[Setting] | None = None,
    scorers: Sequence[str | Scorer] | None = None,
    features: str = DEFAULT,
    out: str | Path | None = None,
    seed: int = 0,
    many_steps: int = TEACHER_STEPS,
    diversity_prompts: int = DIVERSITY_PROMPTS,
    diversity_seeds: int = DIVERSITY_SEEDS,
    curves: str | Path | None = None,
    max_minutes: float | None = None,
    published: Path | None = None,
) -> Metrics:
    """Every setting on the same prompts and seeds: image i starts from seed ``seed + i`` in all of them. Of videos the
    frame in the middle is measured.

    Args:
        prompts: at least two. Real images are compared where an image source has some of the prompt.
        teacher: the model that a student was distilled from; adds its settings and the targets.
        compare: further models by label, each with its own steps and guidance.
        settings: others than ``default_settings``; the first is the reference of the distances to the teacher.
        scorers: by name, as "clip_score:PATH_OR_HUB_ID" where they need a checkpoint, or as objects; None is every
            registered scorer that needs none. A score that applies to none of the prompts is left out.
        features: the feature network of distances and diversity; its name is part of their keys.
        out: a folder for metrics.json, index.html and grid.png; finished images are kept there until these are written,
            and the same evaluation continues from them after an interruption.
        many_steps: the teacher's own number of steps.
        diversity_prompts, diversity_seeds: diversity is measured on so many of the prompts, with so many seeds each.
        curves: a run's metrics.jsonl, plotted in the report.
        max_minutes: where sampling would take longer, only the first prompts are measured, at least 2; None measures
            all. What is measured, and its cost, is printed before the work.
        published: a folder of images that come with a model; they are taken where they were made from the same weights,
            prompts and settings, and a few that are made here agree.

    Raises:
        UserError: too few prompts or seeds, models on several devices or of several image sizes, an unknown scorer or
            network, a folder that cannot be written, or a package that is not installed.
    """
    if len(prompts) < 2:
        raise UserError(f"an evaluation needs at least 2 prompts, got {len(prompts)}")
    if diversity_seeds < 2:
        raise UserError(f"diversity needs at least 2 seeds, got {diversity_seeds}")
    if diversity_prompts < 0:
        raise UserError(f"diversity_prompts: at least 0, got {diversity_prompts}")
    parse_params({"seed": seed, "steps": many_steps})  # in range, before any image is made
    folder = None if out is None else Path(out)
    if folder is not None:
        check_report_folder(folder)
    write_report = report_writer() if folder is not None else None
    chosen = list(settings) if settings is not None else default_settings(model, teacher, many_steps, compare)
    device = model.device
    for setting in chosen:
        if setting.model.device != device:
            raise UserError(f"{setting.name}: its model is on {setting.model.device}, not on {device}; move it there")
    opened = open_scorers(scorers, device)
    if scorers is not None:
        check_applicable(opened, prompts)
    network = open_features(features, device)
    fingerprints = Fingerprints()
    kept = KeptImages(None if folder is None else folder / KEPT, fingerprints)
    given = KeptImages(published if published is not None and published.is_dir() else None, fingerprints)
    made = [setting for setting in chosen if not _is_published(given, setting, prompts, seed)]
    prompts = _within(max_minutes, prompts, made, diversity_prompts, diversity_seeds, kept)
    images: dict[str, ImageSet] = {}
    figures: dict[str, Figures] = {}
    real: list[ImageSet] = []
    with ProgressBars() as bars:
        sets = ImageSets(
            prompts, seed, diversity_prompts, diversity_seeds, network, list(opened.values()), bars, kept, given
        )
        for setting in chosen:
            images[setting.name], figures[setting.name] = sets.generated(setting)
        if len(sets.real_sources) > 1:
            size = chosen[0].model.generation_config.height
            # the distance of two sets of real images is the floor of all distances to them
            real = [sets.real(size, seed=1), sets.real(size, seed=2)]

    reference = images[chosen[0].name]
    for name, each in images.items():
        figures[name] |= sets.figures(each, None if each is reference else reference, real[0] if real else None)
    used = sets.applicable(reference)
    videos = any(setting.model.generation_config.frames > 1 for setting in chosen)
    scores = [key for _, keys in used for key in keys]
    result = Metrics(
        figures=figures,
        real=sets.figures(real[0], reference, real[1]) if real else {},
        scorers={scorer.name: dict(scorer.accuracy) for scorer, _ in used if isinstance(scorer, Classifier)},
        features=network.name,
        run={
            "prompts": len(prompts),
            **({"measured_frame": "the one in the middle"} if videos else {}),
            "scorers": [spec for spec, scorer in opened.items() if any(scorer is one for one, _ in used)],
            "scores": scores,
            "prompts_scored": {key: int((~reference.scores[key].isnan()).sum()) for key in scores},
            "feature_network": features,
            "first_seed": seed,
            "diversity_prompts": min(diversity_prompts, len(prompts)),
            "diversity_seeds": diversity_seeds,
            "device": str(device),
            "dtype": str(model.transformer.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "prompt_list": list(prompts),
        },
    )
    if teacher is not None and settings is None:
        many, few, guided, *_, student = (setting.name for setting in chosen)
        result.targets = targets(figures, student, many, few, guided, network.name)
    if folder is not None and write_report is not None:
        titles = {setting.name: setting.title for setting in chosen}
        shown = images | ({"real": real[0]} if real else {})
        columns = {name: sets.column(each, titles.get(name, "real images")) for name, each in shown.items()}
        result.save(folder / "metrics.json")
        write_report(folder, result, Samples(list(prompts), columns), Path(curves) if curves else None)
        kept.delete()
    return result


def _is_published(images: KeptImages, setting: Setting, prompts: Sequence[str], seed: int) -> bool:
    """Whether a setting's images of all prompts come with its model."""
    params = setting.params(seed).model_dump(mode="json", exclude_defaults=True)
    return images.load(setting.name, images.made_by(setting.model, params=params, prompts=list(prompts))) is not None


def _within(
    max_minutes: float | None,
    prompts: Sequence[str],
    settings: Sequence[Setting],
    diversity_prompts: int,
    diversity_seeds: int,
    kept: KeptImages,
) -> Sequence[str]:
    """The first prompts, as many as are measured in this time; states their cost. An interrupted evaluation continues
    with as many as before."""
    passes = [nfe(setting.steps, setting.guidance_scale > 0) for setting in settings]
    cost = evaluation_cost(len(prompts), passes, diversity_prompts, diversity_seeds)
    if max_minutes is None:
        log_line(f"evaluation: {len(prompts)} prompts, {cost.text}")
        return prompts
    made_by = kept.made_by(
        settings[0].model, prompts=list(prompts), passes=passes, diversity=[diversity_prompts, diversity_seeds],
        max_minutes=max_minutes,
    )  # fmt: skip
    earlier = kept.load_count(made_by)
    if earlier is not None:
        log_line(f"evaluation: continues an interrupted one, of the first {earlier} of {len(prompts)} prompts")
        return prompts[:earlier]
    minutes = expected_minutes(cost, settings, prompts)
    if minutes <= max_minutes or len(prompts) <= MIN_PROMPTS:
        log_line(f"evaluation: {len(prompts)} prompts, {cost.text}, about {minutes:.1f} min")
        return prompts
    count = affordable_prompts(len(prompts), max_minutes / minutes, diversity_prompts, diversity_seeds)
    kept.save_count(made_by, count)
    less = evaluation_cost(count, passes, diversity_prompts, diversity_seeds)
    log_line(
        f"evaluation: the first {count} of {len(prompts)} prompts, {less.text}, about "
        f"{minutes * less.images / cost.images:.1f} min; all would take {minutes:.1f} min, and max_minutes is "
        f"{max_minutes:g}"
    )
    return prompts[:count]


def report_writer() -> Callable[[Path, Metrics, Samples, Path | None], Path]:
    """:func:`fewstep.evaluation.report.write`, whose plots need a package of the "eval" extra.

    Raises:
        UserError: it is not installed.
    """
    try:
        from fewstep.evaluation.report import write
    except ModuleNotFoundError as error:
        raise UserError(f"the evaluation's report needs {error.name}; pip install 'fewstep[eval]'") from None
    return write


def check_report_folder(folder: Path) -> None:
    """Check that a report can be written. Raises: UserError."""
    for name in REPORT_FILES:
        check_file(folder / name)
    check_folder(folder / KEPT)
