"""Measures a model on fixed prompts and seeds, beside its teacher and beside real images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from fewstep.config.sections import PromptSettings
from fewstep.data.prompts import PromptSplit, open_prompts
from fewstep.emoji.classifier import ClassifierOutput, EmojiClassifier, correct
from fewstep.emoji.dataset import EmojiDataset, EmojiSpec
from fewstep.errors import UserError
from fewstep.evaluation import metrics as measure
from fewstep.evaluation import report
from fewstep.evaluation.features import FeatureNet
from fewstep.evaluation.images import as_float, as_uint8
from fewstep.evaluation.metrics_file import Figures, ImageColumn, Metrics, Samples, targets
from fewstep.inference.generate import generate
from fewstep.inference.params import SamplingParams
from fewstep.models.pipeline import TextToImagePipeline

TEACHER_STEPS = 50

#: Starts a progress bar: label, total -> a function to be called with how much more is done.
Bar = Callable[[str, int], Callable[[int], object]]

#: What is measured of every arm. `_judge`: the same on the judge's embedding in place of the ONNX network's features.
ARM_FIGURES = (
    *("name_top1", "style_top1", "color_top1"),
    *("fd_teacher", "fd_real", "mmd_teacher", "mmd_real", "diversity"),
    *("fd_teacher_judge", "fd_real_judge", "mmd_teacher_judge", "mmd_real_judge", "diversity_judge"),
    *("saturation", "contrast", "hf_energy"),
    *("seconds_per_image", "forwards", "steps", "guidance_scale"),
)


@dataclass(frozen=True)
class Setting:
    """One way to make the images: a model, its number of steps, its guidance (`cond + g (cond - null)`; 0 is none)."""

    name: str
    model: TextToImagePipeline
    steps: int
    guidance_scale: float

    @property
    def title(self) -> str:
        guidance = f"guidance {self.guidance_scale:g}" if self.guidance_scale else "no guidance"
        return f"{self.name.split('_')[0]}, {self.steps} {'step' if self.steps == 1 else 'steps'}, {guidance}"


def default_settings(
    model: TextToImagePipeline, teacher: TextToImagePipeline | None = None, many: int = TEACHER_STEPS
) -> list[Setting]:
    """A student beside its teacher at many steps and, without and with guidance, at the student's few; or one alone."""
    if teacher is None:
        if model.generation_config.guidance_distilled:
            return [Setting(f"student_{model.generation_config.steps}", model, model.generation_config.steps, 0.0)]
        return [Setting(f"teacher_{many}", model, many, model.generation_config.guidance_scale)]
    few, best = model.generation_config.steps, teacher.generation_config.guidance_scale
    return [
        Setting(f"teacher_{many}", teacher, many, best),
        Setting(f"teacher_{few}", teacher, few, 0.0),
        Setting(f"teacher_{few}_guided", teacher, few, best),
        Setting(f"student_{few}", model, few, 0.0),
    ]


def emoji_prompts(count: int, split: PromptSplit = "test") -> list[str]:
    """The first ``count`` prompts of a split of the emoji dataset."""
    return list(open_prompts(PromptSettings()).texts(split)[:count])


def evaluate(
    model: TextToImagePipeline,
    *,
    prompts: Sequence[str],
    teacher: TextToImagePipeline | None = None,
    arms: Sequence[Setting] | None = None,
    out: str | Path | None = None,
    seed: int = 0,
    many_steps: int = TEACHER_STEPS,
    diversity_prompts: int = 16,
    diversity_seeds: int = 4,
    judge: EmojiClassifier | None = None,
    curves: str | Path | None = None,
) -> Metrics:
    """Every arm on the same prompts and seeds: image i starts from seed `seed + i` in all of them.

    prompts: at least two. Those of the emoji world are judged, and compared with real images; others only measured.
    teacher: the model a student was made from; adds its arms and the claims.
    arms: other arms than `default_arms`; the first is the reference of `fd_teacher`.
    out: a folder for metrics.json, index.html and grid.png.
    many_steps: the teacher's own number of steps, the reference of all else.
    diversity_prompts, diversity_seeds: diversity is measured on so many of the prompts, so many seeds each.
    judge: the shipped one by default.
    curves: a run's metrics.jsonl, drawn in the report.

    Raises: UserError for too few prompts, a judge of another world, or a folder that cannot be written.
    """
    if len(prompts) < 2:
        raise UserError(f"an evaluation needs at least 2 prompts, got {len(prompts)}")
    if diversity_seeds < 2:
        raise UserError(f"diversity needs at least 2 seeds, got {diversity_seeds}")
    folder = _writable(out)
    chosen = list(arms) if arms is not None else default_settings(model, teacher, many_steps)
    sets: dict[str, _Images] = {}
    figures: dict[str, Figures] = {}
    real: dict[str, _Images] = {}
    with _bars() as bar:
        session = _Session(
            list(prompts), seed, diversity_prompts, diversity_seeds, judge or EmojiClassifier.load(), bar
        )
        for arm in chosen:
            sets[arm.name], figures[arm.name] = session.generated(arm)
        if len(session.known) > 1:
            size = chosen[0].model.generation_config.height
            # Two sets of real images: how far apart they are is the floor of every distance.
            real = {"real": session.real(size, seed=1), "again": session.real(size, seed=2)}

    reference = sets[chosen[0].name]
    for name, images in sets.items():
        figures[name] |= session.figures(images, None if images is reference else reference, real.get("real"))
    result = Metrics(
        arms=figures,
        real=session.figures(real["real"], reference, real["again"]) if real else {},
        judge=dict(
            zip(("name_top1", "style_top1", "color_top1", "images"), session.judge.accuracy.values(), strict=True)
        ),
        settings={
            "prompts": len(prompts),
            "prompts_judged": len(session.known),
            "first_seed": seed,
            "diversity_prompts": min(diversity_prompts, len(prompts)),
            "diversity_seeds": diversity_seeds,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "prompt_list": list(prompts),
        },
    )
    if teacher is not None and arms is None:
        many, few, guided, student = (arm.name for arm in chosen)
        result.targets = targets(figures, student, many, few, guided)
    if folder is not None:
        titles = {arm.name: arm.title for arm in chosen}
        shown = sets | ({"real": real["real"]} if real else {})
        columns = {name: session.column(images, titles.get(name, "real images")) for name, images in shown.items()}
        result.save(folder / "metrics.json")
        report.write(folder, result, Samples(list(prompts), columns), Path(curves) if curves else None)
    return result


@dataclass(frozen=True)
class _Images:
    """A set of images with what two networks see in them.

    main: one of each prompt in `indices`. seeds: [P, S, ...], several of the first P of these.
    """

    main: Tensor
    seeds: Tensor
    features: Tensor
    seed_features: Tensor
    judged: ClassifierOutput
    seed_embedding: Tensor
    indices: list[int]  # the prompts that `main` shows


class _Session:
    """What all arms share: prompts, seeds, concepts, and the two networks."""

    def __init__(self, prompts: list[str], seed: int, some: int, seeds: int, judge: EmojiClassifier, bar: Bar) -> None:
        self.prompts, self.seed, self.judge, self.bar = prompts, seed, judge, bar
        self.some, self.seeds = min(some, len(prompts)), seeds
        self.world = EmojiDataset.load()
        judge.check_objects(self.world)
        self.concepts = [self.world.parse(prompt) for prompt in prompts]
        #: index of a prompt -> what it speaks of, where that is of the emoji world
        self.known: dict[int, EmojiSpec] = {i: c for i, c in enumerate(self.concepts) if c is not None}
        self.net = FeatureNet()

    def generated(self, arm: Setting) -> tuple[_Images, Figures]:
        """The arm's images, and what is known of how they were made."""
        count = len(self.prompts)
        progress = self.bar(arm.title, count + self.some * (self.seeds - 1))
        params = SamplingParams(steps=arm.steps, guidance_scale=arm.guidance_scale, seed=self.seed)
        callback = lambda step: progress(step.finished)  # noqa: E731
        main = generate(arm.model, self.prompts, params, callback)
        # The first of a prompt's seeds is its main image; the others are beyond all main seeds.
        some = [prompt for prompt in self.prompts[: self.some] for _ in range(self.seeds - 1)]
        more = generate(arm.model, some, params.model_copy(update={"seed": self.seed + count}), callback)
        others = more.images.unflatten(0, (self.some, self.seeds - 1))
        seeds = torch.cat([main.images[: self.some, None], others], dim=1)
        figures = {
            "seconds_per_image": main.seconds / count,
            "forwards": main.nfe,
            "steps": arm.steps,
            "guidance_scale": arm.guidance_scale,
        }
        return self._seen(main.images, seeds, list(range(count)), arm.title), figures

    def real(self, size: int, seed: int) -> _Images:
        """Real images of the prompts that the emoji world knows."""
        generator = torch.Generator().manual_seed(2**41 + seed)
        known = list(self.known.values())
        # Several seeds only where that can be set beside the arms': for the very prompts that they have several of.
        some = known[: self.some] if list(self.known)[: self.some] == list(range(self.some)) else []
        images = as_uint8(self.world.render(known + [c for c in some for _ in range(self.seeds - 1)], generator, size))
        main, others = images[: len(known)], images[len(known) :].unflatten(0, (len(some), self.seeds - 1))
        seeds = torch.cat([main[: len(some), None], others], dim=1)
        return self._seen(main, seeds, list(self.known), "real images")

    def _seen(self, main: Tensor, seeds: Tensor, indices: list[int], label: str) -> _Images:
        groups = seeds.shape[:2]
        rest = seeds[:, 1:].flatten(0, 1)
        features = self.net(torch.cat([main, rest]), progress=self.bar(f"{label}: features", len(main) + len(rest)))
        judged, judged_rest = self.judge(main), self.judge(rest)

        def grouped(of_main: Tensor, of_rest: Tensor) -> Tensor:
            return torch.cat([of_main[: groups[0], None], of_rest.unflatten(0, (groups[0], groups[1] - 1))], dim=1)

        return _Images(
            main,
            seeds,
            features[: len(main)],
            grouped(features[: len(main)], features[len(main) :]),
            judged,
            grouped(judged.embedding, judged_rest.embedding),
            indices,
        )

    def figures(self, images: _Images, reference: _Images | None, real: _Images | None) -> Figures:
        """Accuracies, distances and statistics. Distances compare images of the same prompts on both sides."""
        pixels = as_float(images.main)
        return {
            **self._accuracy(images),
            **self._distances("teacher", images, reference),
            **self._distances("real", images, real),
            "diversity": measure.diversity(images.seed_features) if len(images.seeds) else None,
            "diversity_judge": measure.diversity(images.seed_embedding) if len(images.seeds) else None,
            "saturation": measure.saturation(pixels),
            "contrast": measure.contrast(pixels),
            "hf_energy": measure.hf_energy(pixels),
        }

    def _distances(self, label: str, images: _Images, other: _Images | None) -> Figures:
        shared = sorted(set(images.indices) & set(other.indices)) if other is not None else []
        found: Figures = {}
        for suffix in ("", "_judge"):
            found |= {f"fd_{label}{suffix}": None, f"mmd_{label}{suffix}": None}
            if other is None or len(shared) < 2:
                continue
            a, b = (
                (one.judged.embedding if suffix else one.features)[[one.indices.index(i) for i in shared]]
                for one in (images, other)
            )
            found[f"fd_{label}{suffix}"] = measure.frechet_distance(a, b)
            found[f"mmd_{label}{suffix}"] = measure.mmd(a, b)
        return found

    def _accuracy(self, images: _Images) -> Figures:
        """Top-1 of name, style and color over the prompts that are judged, altogether and by language."""
        rows = [row for row, index in enumerate(images.indices) if index in self.known]
        concepts = [self.known[images.indices[row]] for row in rows]
        if not rows:
            return {"name_top1": None, "style_top1": None, "color_top1": None, "by_language": {}}
        hits = correct(images.judged[rows], concepts).values()
        right = dict(zip(("name_top1", "style_top1", "color_top1"), hits, strict=True))
        by_language = {}
        for language in sorted({concept.language for concept in concepts}):
            mask = torch.tensor([concept.language == language for concept in concepts])
            shares = {key: float(hit[mask].float().mean()) for key, hit in right.items()}
            by_language[language] = shares | {"images": int(mask.sum())}
        return {key: float(hit.float().mean()) for key, hit in right.items()} | {"by_language": by_language}

    def column(self, images: _Images, title: str) -> ImageColumn:
        """The set as a report shows it: one image a prompt, grey where the set has none."""
        main = torch.full((len(self.prompts), *images.main.shape[1:]), 127, dtype=torch.uint8)
        main[images.indices] = images.main
        taken_for: list[str | None] = [None] * len(self.prompts)
        for index, name in zip(images.indices, images.judged.object_logits.argmax(1).tolist(), strict=True):
            if index in self.known and name != self.known[index].object:
                taken_for[index] = self.world.objects[name].en
        return ImageColumn(title, main, images.seeds, taken_for)


@contextmanager
def _bars() -> Iterator[Bar]:
    """Bars on a terminal's standard error, one for each piece of work."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as progress:

        def bar(label: str, total: int) -> Callable[[int], object]:
            task = progress.add_task(label, total=total)
            return lambda done: progress.advance(task, done)

        yield bar


def _writable(out: str | Path | None) -> Path | None:
    """The folder, made before anything is computed for it."""
    if out is None:
        return None
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot write here ({error.strerror})") from None
    return folder
