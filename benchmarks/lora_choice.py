"""Is the checkpoint that ``fewstep lora choose`` recommends nearly the best? A LoRA of the emoji dataset, whose best
checkpoint the classifier knows.

    python benchmarks/lora_choice.py --out runs/lora-choice [--steps 400] [--every 50]
        [--prompts 200] [--choice-prompts 32]

The recipe trains a style that the student does not know. ``fewstep lora choose`` sees images of ``--choice-prompts``
prompts of the set and as many unseen ones, and judges adherence to prompts by the nearest real emoji. Every saved
checkpoint is then judged by the classifier, which is in none of that, on other prompts: the mean of three accuracies,
style and names in prompts of the style, and names in other prompts. ``<out>`` gets table.md with both scores. The same
command resumes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from ablation_results import markdown
from dmdr import Figures, kept
from lora import Evaluator
from lora_arms import STUDENT, SUBJECTS

from fewstep.config.load import load_recipe
from fewstep.config.lora_recipe import LoraRecipe
from fewstep.evaluation.lora_choice.runner import ChoiceSettings, as_json, choose_checkpoint
from fewstep.lora_job import train_lora
from fewstep.models.pipeline import load
from fewstep.training.distributed import DistContext
from fewstep.training.precision import resolve_precision
from fewstep.training.run_dir import RunDir

CPU = torch.device("cpu")
JUDGED = ("right", "own_names", "names")
METRICS = {
    "classifier": ("classifier's mean, %", 100, ".1f"),
    "right": ("style, %", 100, ".1f"),
    "own_names": ("names in its prompts, %", 100, ".1f"),
    "names": ("names in other prompts, %", 100, ".1f"),
    "score": ("score of the choice", 1, ".2f"),
    "likeness": ("likeness", 1, ".3f"),
    "flexibility": ("flexibility", 1, ".2f"),
    "memorization": ("memorization", 1, ".2f"),
}

#: Plain training of the student, whose files differ much.
PLAIN = (f"model={STUDENT}", "data.preservation=null", "models.compile=false", "adapter.rank=16")
PLAIN += ("timesteps.distribution=sigmoid", "optim.lora.lr=1.0e-3")


def train(options: argparse.Namespace) -> Path:
    """The run, with a file for every checkpoint; an interrupted one continues."""
    folder = options.out / "run"
    changes = [f"train.steps={options.steps}", f"train.save_every={options.every}", "train.sample_every=0"]
    recipe = load_recipe("micro-lora", [*PLAIN, *changes, f"keep_files={options.steps // options.every}"])
    assert isinstance(recipe, LoraRecipe)
    if not (folder / "lora" / f"{recipe.name}.safetensors").exists():
        recipe = resolve_precision(recipe, folder, DistContext(device=CPU), overwrite=False)
        with RunDir(folder, recipe) as run:
            train_lora(recipe, run, CPU)
    return folder


def judged(file: Path, evaluator: Evaluator) -> Figures:
    """The classifier's figures of a LoRA file."""
    found = evaluator.measure(load(STUDENT, CPU, loras={str(file): 1.0}))
    return found | {"classifier": sum(found[key] or 0 for key in JUDGED) / len(JUDGED)}


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/lora-choice"))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--choice-prompts", type=int, default=32, help="of the set, and unseen ones, for the choice")
    parser.add_argument("--prompts", type=int, default=200, help="of the style, and others")
    return parser.parse_args(words)


def main() -> None:
    options = parse()
    run = train(options)
    settings = ChoiceSettings(scorers=["nearest_real"], count=options.choice_prompts)
    chosen = kept(
        options.out / f"choice-{options.choice_prompts}.json",
        lambda: as_json(choose_checkpoint(run, options.out / "page", settings, CPU)),
    )
    evaluator = Evaluator(SUBJECTS["style"], load(STUDENT, CPU), options.prompts)
    rows: dict[str, list[Figures]] = {}
    for file in sorted((run / "lora").glob("*-*[0-9].safetensors")):
        name = f"step {int(file.stem.rsplit('-', 1)[1])}"
        found = kept(options.out / f"{name.replace(' ', '-')}.json", lambda file=file: judged(file, evaluator))
        rows[name] = [found | chosen["checkpoints"]["figures"][name]]
    (options.out / "table.md").write_text(
        markdown(rows, METRICS, "Checkpoints by classifier and by fewstep lora choose")
    )
    best = max(rows, key=lambda name: rows[name][0]["classifier"] or 0)
    taken = chosen["checkpoints"]["best"]
    print(json.dumps({name: rows[name][0]["classifier"] for name in rows}))
    lost = 100 * ((rows[best][0]["classifier"] or 0) - (rows[taken][0]["classifier"] or 0))
    print(f"recommended: {taken}; best by the classifier: {best}; {lost:.1f} points apart (target: at most 2)")


if __name__ == "__main__":
    main()
