"""Ways to train a LoRA for a 4-step student, on the emoji dataset at equal wall time: what is learned, what is lost.

    python benchmarks/lora.py --out runs/lora-study [--subjects style thing] [--arms "a plain" ...] [--seeds 0 1 2]
        [--minutes 5] [--plan] [--strengths 0.6 0.8 1 1.2 1.4]

"style" teaches Fluent 3D, which the teacher was not trained on, from 75 images; "thing" an object under a name that the
teacher has never seen, from 20. Every arm computes for the same time on one thread (set OMP_NUM_THREADS=1), a LoRA of
the base that it starts from included; the training adapter of arm b is made once, in ``--adapter-minutes``, which are
printed and not counted. All are measured with the student's 4 steps on the same prompts and seeds. ``--plan`` prints
the time, and stops.

``--strengths`` uses the preserved LoRA of the base (arm c, the first seed's) on the student at each of these strengths
instead, for strengths.md.

Finished runs are kept: the same command resumes. ``<out>`` gets table.md, figures.json and plot.png.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from ablation_results import markdown
from dmdr import ENDLESS, Figures, folder_name, kept
from lora_arms import ARMS, BASE, FLOW_MATCHING, ON_BASE, PRESERVED, STUDENT, SUBJECTS, Subject
from matplotlib import colormaps
from matplotlib.figure import Figure

from fewstep.atomic import write_text
from fewstep.config.load import load_recipe
from fewstep.config.lora_recipe import LoraRecipe
from fewstep.config.sections import PromptSettings
from fewstep.data.prompts import open_prompts
from fewstep.emoji.scorer import EmojiScorer
from fewstep.evaluation import metrics as measure
from fewstep.evaluation.applicability import mean_scores
from fewstep.evaluation.feature_networks import open_features
from fewstep.evaluation.images import as_float
from fewstep.inference.generate import generate
from fewstep.inference.params import SamplingParams
from fewstep.lora_job import train_lora
from fewstep.models.pipeline import TextToImagePipeline, load
from fewstep.training.distributed import DistContext
from fewstep.training.precision import resolve_precision
from fewstep.training.run_dir import RunDir

CPU = torch.device("cpu")
SEEDS = 4  # images of a prompt, for diversity

#: Metric -> its title, its factor, and its format.
METRICS = {
    "right": ("subject right, %", 100, ".1f"),
    "own_names": ("names in its prompts, %", 100, ".1f"),
    "names": ("names in other prompts, %", 100, ".1f"),
    "changed": ("other images changed, ×1000", 1000, ".1f"),
    "hf_energy": ("hf energy, ×1000", 1000, ".3f"),
    "diversity": ("diversity, ×1000", 1000, ".1f"),
    "nfe": ("forwards", 1, ".0f"),
    "steps": ("training steps", 1, ".0f"),
}


class Evaluator:
    """Measures models on prompts of a subject and on other prompts, beside the student without a LoRA.

    Args:
        count: prompts of each kind.
    """

    def __init__(self, subject: Subject, student: TextToImagePipeline, count: int) -> None:
        self.right = subject.right
        self.prompts, self.shown = subject.prompts(count)
        self.others = list(open_prompts(PromptSettings()).texts("test")[:count])
        self.repeated = [prompt for prompt in self.prompts[: count // SEEDS] for _ in range(SEEDS)]
        self.network, self.scorer = open_features(), EmojiScorer()
        self.without = self.network(generate(student, self.others).images)

    def measure(self, model: TextToImagePipeline) -> Figures:
        """The figures of a model's images, by its own steps."""
        others = generate(model, self.others).images
        similarity = F.cosine_similarity(self.network(others), self.without)
        return self.measure_subject(model) | {
            "names": mean_scores(self.scorer.score(others, self.others))["object_acc"],
            "changed": float((1 - similarity).mean()),
        }

    def measure_subject(self, model: TextToImagePipeline) -> Figures:
        """Those of the subject's prompts alone."""
        own = generate(model, self.prompts)
        seeds = generate(model, self.repeated, SamplingParams(seed=len(self.prompts))).images
        scores = mean_scores(self.scorer.score(own.images, self.shown))
        return {
            "right": scores[self.right],
            "own_names": scores["object_acc"],
            "hf_energy": measure.hf_energy(as_float(own.images)),
            "diversity": measure.diversity(self.network(seeds).unflatten(0, (-1, SEEDS))),
            "nfe": own.nfe,
        }


def train(recipe: str, overrides: Sequence[str], folder: Path, cache: Path, minutes: float, seed: int) -> Path:
    """A LoRA of so many minutes of training; an interrupted run continues, a finished one is kept."""
    common = [f"train.max_minutes={minutes}", "train.clock=thread", f"train.steps={ENDLESS}", f"train.seed={seed}"]
    common += ["train.sample_every=0", "keep_files=1", "models.compile=auto", f"data.cache={cache}"]
    resolved = load_recipe(recipe, [*common, *overrides])
    assert isinstance(resolved, LoraRecipe)
    file = folder / "lora" / f"{resolved.name}.safetensors"
    if not file.exists():
        resolved = resolve_precision(resolved, folder, DistContext(device=CPU), overwrite=False)
        with RunDir(folder, resolved) as run:
            return train_lora(resolved, run, CPU)
    return file


def training_adapter(options: argparse.Namespace) -> Path:
    """The student's training adapter, which all runs share."""
    changes = (f"model={STUDENT}", "data.own_images={prompts: emoji, count: 500}", "adapter.rank=16")
    rates = ("optim.lora={lr: 1.0e-4, ema_decay: 0.98}", "models={frozen_dtype: fp32}", "train.batch_size=16")
    return train(
        "training-adapter",
        [*changes, *rates],
        options.out / "adapter",
        options.out / "cache",
        options.adapter_minutes,
        0,
    )


def train_arm(name: str, subject: str, seed: int, options: argparse.Namespace) -> tuple[Path, Path]:
    """The LoRA file of an arm, and its run."""
    arm, folder = ARMS[name], options.out / subject / f"{folder_name(name)}-{seed}"
    data, cache = f"data.images={options.out / subject / 'set'}", options.out / "cache"
    files = {}
    if "ADAPTER" in str(arm.overrides):
        files["ADAPTER"] = training_adapter(options)
    if arm.base_share:
        share, preserved = options.minutes * arm.base_share, PRESERVED if PRESERVED[0] in arm.overrides else ()
        base = options.out / subject / f"base{'-preserved' if preserved else ''}-{seed}"
        files["BASE_LORA"] = train("micro-lora", [data, *FLOW_MATCHING, *preserved, *ON_BASE], base, cache, share, seed)
    overrides = [data, *arm.overrides]
    for word, file in files.items():
        overrides = [each.replace(word, str(file)) for each in overrides]
    return train(arm.recipe, overrides, folder, cache, options.minutes * (1 - arm.base_share), seed), folder


def run(name: str, subject: str, seed: int, evaluator: Evaluator, options: argparse.Namespace) -> Figures:
    """The figures of one arm, subject and seed, from disk if they are there."""

    def find() -> Figures:
        file, folder = train_arm(name, subject, seed, options)
        last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        found = evaluator.measure(load(STUDENT, CPU, loras={str(file): 1.0}))
        if ON_BASE[0] in ARMS[name].overrides:
            many = evaluator.measure_subject(load(BASE, CPU, loras={str(file): 1.0}))
            found |= {f"many_{key}": value for key, value in many.items()}
        return found | {"steps": last["step"], "minutes": last["seconds"] / 60}

    return kept(options.out / subject / f"{folder_name(name)}-{seed}.json", find)


def sweep(subject: str, evaluator: Evaluator, options: argparse.Namespace) -> None:
    """Measure the base's LoRA on the student at every strength."""
    folder, name = options.out / subject, "c on the base, preserved"
    file, _ = train_arm(name, subject, options.seeds[0], options)
    found = {
        f"strength {strength:g}": [
            kept(
                folder / f"{folder_name(name)}-at-{strength:g}.json",
                lambda strength=strength: evaluator.measure(load(STUDENT, CPU, loras={str(file): strength})),
            )
        ]
        for strength in options.strengths
    }
    metrics = {key: value for key, value in METRICS.items() if key not in ("nfe", "steps")}
    write_text(folder / "strengths.md", markdown(found, metrics, f"A LoRA of the base on the student: {subject}"))


def rows(found: Mapping[str, Sequence[Figures]], reference: Mapping[str, Figures]) -> dict[str, Sequence[Figures]]:
    """The table's rows; of an arm on the base also one with the base's own many steps."""
    many = {
        f"{name}, base's own steps": [
            {key.removeprefix("many_"): value for key, value in one.items() if key.startswith("many_")} for one in seeds
        ]
        for name, seeds in found.items()
        if "many_right" in seeds[0]
    }
    return {**{name: [one] for name, one in reference.items()}, **found, **many}


def draw(found: Mapping[str, Sequence[Figures]], reference: Mapping[str, Figures]) -> Figure:
    """What is learned against what is lost: names in other prompts, and changed images; one point for each seed."""
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    panels = figure.subplots(1, 2)
    for panel, key in zip(panels, ("names", "changed"), strict=True):
        title, factor, _ = METRICS[key]
        for index, (name, seeds) in enumerate(rows(found, reference).items()):
            points = [(factor * (one[key] or 0), 100 * (one["right"] or 0)) for one in seeds if key in one]
            if not points:
                continue
            marker = "*" if name in reference else "o"
            panel.plot(*zip(*points, strict=True), marker, color=colormaps["tab20"](index % 20), label=name)
        panel.set_xlabel(title)
        panel.set_title(METRICS["right"][0], loc="left")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    return figure


def cost(options: argparse.Namespace) -> str:
    """What the study trains."""
    runs = len(options.subjects) * len(options.arms) * len(options.seeds)
    return (
        f"{runs} runs of {options.minutes:g} min: {runs * options.minutes / 60:.1f} h of training, "
        f"{options.adapter_minutes:g} min for the training adapter, and {3 * options.prompts} images of each LoRA"
    )


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/lora-study"))
    parser.add_argument("--subjects", nargs="+", default=list(SUBJECTS), choices=list(SUBJECTS))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="ARM")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, default=5.0, help="of training, for each arm")
    parser.add_argument("--adapter-minutes", type=float, default=5.0, help="of training the adapter of arm b, once")
    parser.add_argument("--prompts", type=int, default=200, help="of the subject, and others")
    parser.add_argument("--strengths", type=float, nargs="+", help="measure arm c's LoRA at these, and nothing else")
    parser.add_argument("--plan", action="store_true", help="print the time, and stop")
    return parser.parse_args(words)


def main() -> None:
    options = parse()
    print(cost(options), flush=True)
    if options.plan:
        return
    student = load(STUDENT, CPU)
    for subject in options.subjects:
        folder = options.out / subject
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "set").exists():
            SUBJECTS[subject].write(folder / "set")
        evaluator = Evaluator(SUBJECTS[subject], student, options.prompts)
        if options.strengths:
            sweep(subject, evaluator, options)
            continue
        found: dict[str, list[Figures]] = {}
        for seed in options.seeds:
            for name in options.arms:
                found.setdefault(name, []).append(run(name, subject, seed, evaluator, options))
        reference = kept(
            folder / "reference.json",
            lambda one=evaluator: {"student, no LoRA": one.measure(student), "base, no LoRA": one.measure(load(BASE))},
        )
        write_text(folder / "figures.json", json.dumps({"reference": reference, "arms": found}, indent=1))
        table = markdown(rows(found, reference), METRICS, f"LoRA for a 4-step student: {subject}")
        write_text(folder / "table.md", table)
        draw(found, reference).savefig(folder / "plot.png", dpi=110)


if __name__ == "__main__":
    main()
