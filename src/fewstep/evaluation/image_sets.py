"""Sets of images with their features and scores: of each setting, and of real images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.core.registry import image_sources, load_plugins
from fewstep.core.seeds import generator, image_seed
from fewstep.data.images import middle_frame, strip
from fewstep.errors import UserError
from fewstep.evaluation import metrics as measure
from fewstep.evaluation.applicability import mean_scores
from fewstep.evaluation.feature_networks import FeatureNetwork, with_network
from fewstep.evaluation.images import as_float, as_uint8
from fewstep.evaluation.kept_images import KeptImages
from fewstep.evaluation.metrics_file import Figures, ImageColumn
from fewstep.evaluation.settings import Setting
from fewstep.inference.generate import GenerationResult, generate
from fewstep.inference.params import SamplingParams
from fewstep.progress import ProgressBars, log_line
from fewstep.rewards.protocol import Classifier, Grouped, Scorer

CHECKED_IMAGES, MAX_DIFFERENCE = 8, 1.0  # of published images are made again; the mean difference, of 255

_BLANK = torch.zeros(1, 64, 64, 3, dtype=torch.uint8)


@dataclass(frozen=True)
class ImageSet:
    """
    Attributes:
        main: uint8 [N, H, W, 3], one image of each prompt in ``indices``; of a video the frame in the middle.
        shown, shown_seeds: uint8 [N, H, W', 3] and [P, S, H, W', 3], the images, or strips of the videos, of each
            prompt, and of several seeds of the first P.
        features, seed_features: [N, D] and [P, S, D].
        scores: float [N] by key, NaN where a score does not apply.
    """

    main: Tensor
    shown: Tensor
    shown_seeds: Tensor
    features: Tensor
    seed_features: Tensor
    scores: dict[str, Tensor]
    indices: list[int]


class ImageSets:
    """Makes image sets of one list of prompts and seeds, and measures them.

    Args:
        diversity_prompts, diversity_seeds: how many prompts have several seeds, and how many.
        bars: shows the progress.
        kept: images of an earlier call that was interrupted; new ones are added.
        published: images that come with a model.

    Raises:
        UserError: two scorers have a score of the same name.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        seed: int,
        diversity_prompts: int,
        diversity_seeds: int,
        network: FeatureNetwork,
        scorers: Sequence[Scorer],
        bars: ProgressBars,
        kept: KeptImages,
        published: KeptImages,
    ) -> None:
        self.kept, self.published = kept, published
        self.prompts, self.seed, self.network, self.scorers, self.bars = list(prompts), seed, network, scorers, bars
        self.some, self.num_seeds = min(diversity_prompts, len(prompts)), diversity_seeds
        #: the names of each scorer's scores
        self.score_keys = [list(scorer.score(_BLANK, self.prompts[:1])) for scorer in scorers]
        all_keys = [key for keys in self.score_keys for key in keys]
        for key in all_keys:
            if all_keys.count(key) > 1:
                raise UserError(f"scorers: two of them have a score {key}; evaluate with one at a time")
        load_plugins()
        sources = [image_sources.get(name)() for name in image_sources.names()]
        #: the source of real images of each prompt that has one
        self.real_sources: dict[int, Any] = {
            index: source for index, prompt in enumerate(prompts) for source in sources if source.knows(prompt)
        }

    def generated(self, setting: Setting) -> tuple[ImageSet, Figures]:
        """A setting's images, and how they were made."""
        count = len(self.prompts)
        progress = self.bars.add(setting.title, count + self.some * (self.num_seeds - 1))
        # The first of a prompt's seeds is its main image; the others are beyond all main seeds.
        some = [prompt for prompt in self.prompts[: self.some] for _ in range(self.num_seeds - 1)]
        params = setting.params(self.seed)
        other_params = setting.params(image_seed(self.seed, count))
        main = self._published(setting, self.prompts, params, progress)
        more = None
        if main is not None:
            more = self.published.load(*self._kept_as(self.published, setting, some, other_params, "-seeds"))
        if main is None:
            main = self._generated(setting, self.prompts, params, progress)
        if more is None:
            more = self._generated(setting, some, other_params, progress, "-seeds")
        figures = {
            "seconds_per_image": main.seconds / count,
            "nfe": main.nfe,
            "steps": setting.steps,
            "guidance_scale": setting.guidance_scale,
        }
        return self._measured(main.images, more.images, self.some, list(range(count)), setting.title), figures

    def _kept_as(
        self, where: KeptImages, setting: Setting, prompts: list[str], params: SamplingParams, part: str = ""
    ) -> tuple[str, dict[str, Any]]:
        """The name of a setting's images, and what they depend on."""
        made_by = where.made_by(
            setting.model, params=params.model_dump(mode="json", exclude_defaults=True), prompts=prompts
        )
        return f"{setting.name}{part}", made_by

    def _generated(
        self,
        setting: Setting,
        prompts: list[str],
        params: SamplingParams,
        progress: Callable[[int], object],
        part: str = "",
    ) -> GenerationResult:
        """Images of a setting, those that were kept if there are any."""
        name, made_by = self._kept_as(self.kept, setting, prompts, params, part)
        found = self.kept.load(name, made_by)
        if found is not None:
            progress(len(prompts))
            return found
        made = generate(setting.model, prompts, params, lambda step: progress(step.finished))
        self.kept.save(name, made_by, made)
        return made

    def _published(
        self, setting: Setting, prompts: list[str], params: SamplingParams, progress: Callable[[int], object]
    ) -> GenerationResult | None:
        """Images that come with the setting's model, with the time that they take here; None where there are none, or
        the model makes others here."""
        found = self.published.load(*self._kept_as(self.published, setting, prompts, params))
        if found is None:
            return None
        count = min(CHECKED_IMAGES, len(prompts))
        here = generate(setting.model, prompts[:count], params)
        difference = (here.images.float() - found.images[:count].float()).abs().mean()
        if difference > MAX_DIFFERENCE:
            log_line(f"{setting.title}: the images that come with the model differ from those made here; making all")
            return None
        progress(len(prompts))
        return GenerationResult(found.images, found.nfe, here.seconds / count * len(prompts))

    def real(self, size: int, seed: int) -> ImageSet:
        """Real images of the prompts that have some."""
        stream = generator("real images", seed)
        indices = list(self.real_sources)
        # Several seeds only for the prompts that the settings have several of.
        some = indices[: self.some] if indices[: self.some] == list(range(self.some)) else []
        wanted = indices + [index for index in some for _ in range(self.num_seeds - 1)]
        by_source: dict[int, list[int]] = {}
        for row, index in enumerate(wanted):
            by_source.setdefault(id(self.real_sources[index]), []).append(row)
        images = torch.zeros(len(wanted), size, size, 3, dtype=torch.uint8)
        for rows in by_source.values():
            source = self.real_sources[wanted[rows[0]]]
            images[rows] = as_uint8(source.render([self.prompts[wanted[row]] for row in rows], stream, size))
        return self._measured(images[: len(indices)], images[len(indices) :], len(some), indices, "real images")

    def _measured(self, main: Tensor, others: Tensor, some: int, indices: list[int], label: str) -> ImageSet:
        """
        Args:
            main: images or videos of the prompts in ``indices``.
            others: further seeds of the first ``some`` of these.
        """
        count = len(main)
        shown, frames = strip(torch.cat([main, others])), middle_frame(torch.cat([main, others]))
        progress = self.bars.add(f"{label}: features", len(frames))
        features = self.network(frames, progress)
        prompts = [self.prompts[index] for index in indices]
        scores = {key: value for scorer in self.scorers for key, value in scorer.score(frames[:count], prompts).items()}

        def seeds(each: Tensor) -> Tensor:
            return torch.cat([each[:some, None], each[count:].unflatten(0, (some, self.num_seeds - 1))], dim=1)

        return ImageSet(frames[:count], shown[:count], seeds(shown), features[:count], seeds(features), scores, indices)

    def figures(self, images: ImageSet, reference: ImageSet | None, real: ImageSet | None) -> Figures:
        """Scores, distances and pixel statistics. Distances compare images of the same prompts on both sides."""
        pixels = as_float(images.main)
        diversity = measure.diversity(images.seed_features) if len(images.shown_seeds) else None
        return {
            **mean_scores(images.scores),
            "by_group": self._by_group(images),
            **self._distances("teacher", images, reference),
            **self._distances("real", images, real),
            with_network("diversity", self.network.name): diversity,
            "saturation": measure.saturation(pixels),
            "contrast": measure.contrast(pixels),
            "hf_energy": measure.hf_energy(pixels),
            "sharpness": _sharpness(images, real),
        }

    def _distances(self, label: str, images: ImageSet, other: ImageSet | None) -> Figures:
        fd, mmd = (with_network(f"{name}_{label}", self.network.name) for name in ("fd", "mmd"))
        shared = sorted(set(images.indices) & set(other.indices)) if other is not None else []
        if other is None or len(shared) < 2:
            return {fd: None, mmd: None}
        a, b = (one.features[[one.indices.index(i) for i in shared]] for one in (images, other))
        return {fd: measure.frechet_distance(a, b), mmd: measure.mmd(a, b)}

    def _by_group(self, images: ImageSet) -> dict[str, Figures]:
        """Scores of each group of prompts, such as a language, and the number of its images."""
        found: dict[str, Figures] = {}
        for scorer, keys in zip(self.scorers, self.score_keys, strict=True):
            if not isinstance(scorer, Grouped):
                continue
            groups = [scorer.group(self.prompts[index]) for index in images.indices]
            for group in sorted({group for group in groups if group is not None}):
                rows = [row for row, each in enumerate(groups) if each == group]
                means = mean_scores({key: images.scores[key][rows] for key in keys})
                found[group] = found.get(group, {}) | means | {"images": len(rows)}
        return found

    def column(self, images: ImageSet, title: str) -> ImageColumn:
        """The set as a report shows it: one image, or strip of a video, for each prompt, gray where the set has none.

        A prediction is shown where the first score of its classifier is 0.
        """
        main = torch.full((len(self.prompts), *images.shown.shape[1:]), 127, dtype=torch.uint8)
        main[images.indices] = images.shown
        predicted: list[str | None] = [None] * len(self.prompts)
        for scorer, keys in zip(self.scorers, self.score_keys, strict=True):
            if not isinstance(scorer, Classifier):
                continue
            names = scorer.predictions(images.main)
            for index, name, score in zip(images.indices, names, images.scores[keys[0]].tolist(), strict=True):
                if score == 0:
                    predicted[index] = name
        return ImageColumn(title, main, images.shown_seeds, predicted)

    def applicable(self, images: ImageSet) -> list[tuple[Scorer, list[str]]]:
        """The scorers that score at least one of the prompts, with the names of these scores."""
        found = []
        for scorer, keys in zip(self.scorers, self.score_keys, strict=True):
            used = list(mean_scores({key: images.scores[key] for key in keys}))
            if used:
                found.append((scorer, used))
        return found


def _sharpness(images: ImageSet, real: ImageSet | None) -> float | None:
    """High-frequency energy relative to that of real images of the same prompts; None where there are none, or no
    detail in them."""
    rows = [row for row, index in enumerate(images.indices) if real is not None and index in real.indices]
    if real is None or not rows:
        return None
    reference = measure.hf_energy(as_float(real.main))
    return measure.hf_energy(as_float(images.main[rows])) / reference if reference else None
