"""Reuse of layers between steps: speed, and the distance to the images without it, for each method.

The teacher at 50 guided steps and the student at its own steps, with equal prompts and seeds. Distances are mean
absolute differences of images with values of 0 to 255; the last rows of a model have fewer steps instead. Times are CPU
times of one thread, which other work on the machine changes little.

    python benchmarks/caching.py [--teacher micro] [--student micro-turbo] [--images 4]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fewstep.evaluation.prompts import read_test_prompts
from fewstep.inference.generate import generate
from fewstep.inference.params import parse_params
from fewstep.models.pipeline import TextToImagePipeline, load

METHODS = (
    *("first-block:0.05", "first-block:0.1", "first-block:0.2", "first-block:0.4"),
    *("interval:2", "interval:3", "interval:5", "taylor:2", "taylor:3", "taylor:5"),
)
STUDENT_METHODS = ("first-block:0.2", "first-block:0.4", "interval:2", "taylor:2")


def draw(pipeline: TextToImagePipeline, prompts: Sequence[str], **params: object) -> tuple[Tensor, float]:
    """Images, and seconds of CPU time with their decoding."""
    start = time.process_time()
    images = generate(pipeline, prompts, parse_params({"seed": 1, **params})).images
    return images.float(), time.process_time() - start


def compare(
    table: Table, pipeline: TextToImagePipeline, prompts: Sequence[str], methods: Sequence[str], fewer: Sequence[int]
) -> None:
    """A row for each method, and for fewer steps without reuse."""
    draw(pipeline, prompts, steps=2)  # encodes the prompts
    plain, seconds = draw(pipeline, prompts)
    settings: dict[str, dict[str, object]] = {method: {"cache": method} for method in methods}
    settings |= {f"{steps} steps": {"steps": steps} for steps in fewer}
    for name, setting in settings.items():
        made, less = draw(pipeline, prompts, **setting)
        row = (f"{seconds / less:.2f}", f"{float((made - plain).abs().mean()):.2f}")
        print(name, *row, flush=True)
        table.add_row(f"{pipeline.generation_config.steps} steps", name, *row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="micro")
    parser.add_argument("--student", default="micro-turbo")
    parser.add_argument("--images", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = Table("model", "setting", "speedup", "distance", title="reuse of layers")
    for model, methods, fewer in ((options.teacher, METHODS, (25, 17, 10)), (options.student, STUDENT_METHODS, (2,))):
        pipeline = load(model, "cpu")
        compare(table, pipeline, read_test_prompts(None, options.images, model=model), methods, fewer)
    Console().print(table)


if __name__ == "__main__":
    main()
