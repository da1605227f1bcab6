"""Packs a distilled micro student for publication: half-precision files, the teacher's components as links, a card."""

from __future__ import annotations

import filecmp
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from fewstep.atomic import write_text
from fewstep.config.load import read_yaml
from fewstep.data.images import grid
from fewstep.emoji.dataset import EmojiDataset
from fewstep.emoji.model_card import cpu_name
from fewstep.emoji.publish import convert_to_fp16
from fewstep.emoji.teacher_quality import prompts_of
from fewstep.errors import UserError
from fewstep.evaluation.metrics_file import Metrics
from fewstep.evaluation.table import columns, label, rows
from fewstep.inference.generate import generate
from fewstep.models.components import resolve_model
from fewstep.models.pipeline import load
from fewstep.models.replaceable import check_replaceable
from fewstep.outputs import write_image
from fewstep.training.tracking import read_metrics

GRID_IMAGES = 32

CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
language: [en, zh]
---

# {name}: the micro model in {steps} steps

The bundled teacher `{teacher}`, distilled to {steps} steps without guidance by the recipe below. Run it with
`fewstep generate {name} "a noto emoji of a red apple on a blue background"`, or load it with diffusers'
`ZImagePipeline` and `guidance_scale=0`. The files are fp16. Text encoder, tokenizer and autoencoder are the teacher's.

![Images of the teacher at {many} steps and of the student at {steps}](samples.png)

{grid_images} held-out prompts; in each pair the teacher's image is on the left, the student's on the right, from the
same noise.

## Quality

{prompts} held-out test prompts with the same seeds for all. Distances and diversity use the features of the network
{features}.

{figures}

## Training

{train_steps} steps in {minutes:.1f} minutes on {threads} CPU cores ({cpu}), without a GPU.

```yaml
{recipe}```
"""


def publish_student(run: Path, out: Path) -> str:
    """Write a run's student, its card and a grid of samples to ``out``; returns the card's table of figures.

    Args:
        run: directory of a finished ``fewstep distill`` with its report.
        out: a folder beside its teacher's; components that both share become relative links to the teacher's.

    Raises:
        UserError: ``out`` cannot be written or holds other files than a model, or the run has no student or report.
    """
    check_replaceable(out)
    report = run / "report" / "metrics.json"
    if not report.is_file():
        raise UserError(f"{report}: no such file; give the directory of a finished run that was evaluated")
    metrics = Metrics.load(report)
    lines, recipe = read_metrics(run / "metrics.jsonl"), read_yaml(run / "recipe.yaml")
    student = load(run / "student", "cpu")
    teacher_name = str(student.generation_config.teacher)
    student.save(out)
    convert_to_fp16(out)
    link_shared_components(out, resolve_model(teacher_name))

    teacher, student = load(teacher_name, "cpu"), load(out, "cpu")
    prompts = prompts_of(EmojiDataset.load().sample(GRID_IMAGES, "test", seed=8))
    pairs = torch.stack([generate(model, prompts).images for model in (teacher, student)], dim=1)
    write_image(grid(pairs.flatten(0, 1), columns=16), out / "samples.png")
    figures = figure_table(metrics)
    card = CARD.format(
        name=out.name,
        teacher=teacher_name,
        steps=student.generation_config.steps,
        many=teacher.generation_config.steps,
        grid_images=GRID_IMAGES,
        prompts=metrics.run["prompts"],
        features=metrics.features,
        figures=figures,
        train_steps=int(lines[-1]["step"]),
        minutes=lines[-1]["seconds"] / 60,
        threads=torch.get_num_threads(),
        cpu=cpu_name(),
        recipe=yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True),
    )
    write_text(out / "README.md", card)
    return figures


def link_shared_components(folder: Path, teacher: Path) -> list[str]:
    """Replace the components that a distillation leaves as they are by relative links to the teacher's; returns their
    names.

    Raises:
        UserError: the weights of one differ from the teacher's.
    """
    shared = sorted(path for path in folder.iterdir() if path.is_dir() and path.name != "transformer")
    for component in shared:
        other = teacher / component.name
        for file in component.glob("*.safetensors"):
            if not (other / file.name).is_file() or not filecmp.cmp(file, other / file.name, shallow=False):
                raise UserError(f"{file}: other weights than the teacher's, {other}")
        shutil.rmtree(component)
        component.symlink_to(os.path.relpath(other, folder), target_is_directory=True)
    return [component.name for component in shared]


def figure_table(metrics: Metrics) -> str:
    """The figures of an evaluation as a Markdown table."""
    settings: Mapping[str, Any] = columns(metrics)
    heads = [" ".join(label(name, figures)) for name, figures in settings.items()]
    lines = [["", *heads], ["---"] * (len(heads) + 1)]
    lines += [[row.label.strip(), *cells] for row, cells in rows(metrics)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
