"""A transformer compiled ahead of time beside the eager one and one with compiled blocks: time of a forward pass.

The three alternate, so that a change of the machine's speed affects all; ratios are of medians. Times are CPU times of
one thread, which other work on the machine changes little.

    python benchmarks/aot.py [--model micro-turbo] [--batch 1] [--runs 30]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from fewstep.export.aot import export_package
from fewstep.models.pipeline import TextToImagePipeline, load

PROMPT = "a noto emoji of a fox on a blue background"


class Timed:
    """A model's forward pass, and its times."""

    def __init__(self, pipeline: TextToImagePipeline, batch: int) -> None:
        config = pipeline.generation_config
        self.pipeline, self.prompts = pipeline, pipeline.encode([PROMPT] * batch)
        torch.manual_seed(0)
        self.x = torch.randn(batch, *pipeline.latent_shape(config.height, config.width))
        self.sigma = torch.full((batch,), 0.5)
        self.seconds: list[float] = []

    @torch.no_grad()
    def run(self) -> torch.Tensor:
        with self.pipeline.denoiser.cache_text_tokens():
            self.pipeline.denoiser(self.x, self.sigma, self.prompts)  # the text's own work
            start = time.process_time()
            velocity: torch.Tensor = self.pipeline.denoiser(self.x, self.sigma, self.prompts)
            self.seconds.append(time.process_time() - start)
        return velocity


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="micro-turbo")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--runs", type=int, default=30)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        file, eager = Path(folder) / "model.pt2", load(options.model, "cpu")
        start = time.perf_counter()
        export_package(eager, file, eager.generation_config.height, options.batch)
        made, size = time.perf_counter() - start, file.stat().st_size
        models = {"eager": Timed(eager, options.batch)}
        blocks = load(options.model, "cpu")
        blocks.denoiser.compile_repeated_blocks()
        models["compiled blocks"] = Timed(blocks, options.batch)
        models["ahead of time"] = Timed(load(options.model, "cpu", aot=file), options.batch)
        velocities = [model.run() for model in models.values()]  # compiles
        for _ in range(options.runs):
            for model in models.values():
                model.run()
    table = Table("", "ms", "speedup", title=f"batch {options.batch}, CPU time of one thread")
    base = statistics.median(models["eager"].seconds[1:])
    for name, model in models.items():
        median = statistics.median(model.seconds[1:])
        table.add_row(name, f"{1000 * median:.1f}", f"{base / median:.2f}")
    console = Console()
    console.print(table)
    far = max(float((velocities[0] - other).abs().max()) for other in velocities[1:])
    console.print(f"package: {made:.0f} s to compile, {size / 1e6:.1f} MB; largest difference of velocities {far:.1e}")


if __name__ == "__main__":
    main()
