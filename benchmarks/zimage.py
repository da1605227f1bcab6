"""Z-Image's shape with random weights: seconds per image compared with diffusers' pipeline, and per DMD iteration.

On a GPU at full size (6.15e9 parameters, 1024 px). On a CPU the same code runs a tiny model, or with --full the large
one at a --resolution that a CPU can wait for. Weights do not matter to speed or memory, so none are downloaded. Each
time of an image is the median of some repeats after a warm-up; that of an iteration is the mean.

    python benchmarks/zimage.py [--device cuda] [--repeats 5] [--no-compile] [--only images|iterations]
    python benchmarks/zimage.py --device cpu --full --resolution 128 --repeats 1 --no-compile --only images
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from diffusers import ZImagePipeline
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from zimage_bench import STEPS, Bench, forward_flops

from fewstep.config.load import load_recipe, with_overrides
from fewstep.config.recipe import DistillRecipe, StagesRecipe
from fewstep.core.conditioning import EncodedPrompts
from fewstep.core.samplers import sample_euler
from fewstep.data.batch import DistillBatch
from fewstep.errors import UserError
from fewstep.export.diffusers import to_diffusers
from fewstep.methods.base import MethodSetup
from fewstep.methods.dmd.method import DMD
from fewstep.methods.models_setup import Models, build_models
from fewstep.models.pipeline import TextToImagePipeline
from fewstep.models.quantize import Fp8Linear, quantize_fp8_, supports_fp8_matmul
from fewstep.models.zimage.block import block_forward
from fewstep.plan.estimate import plan
from fewstep.stages import stage_recipe
from fewstep.training.distributed import DistContext
from fewstep.training.train_state import TrainState

#: How the models are held in memory, by the name in the table.
MODELS_VARIANTS = {
    "LoRA on one base, fp8": ("models.frozen_dtype=fp8",),
    "LoRA on one base, bf16": ("models.frozen_dtype=bf16",),
    "three full copies": ("models.train=full", "models.frozen_dtype=bf16"),
}


# --- images ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def images(bench: Bench) -> Table:
    """One image of 8 steps without guidance, decoded."""
    model = bench.model()
    prompts = bench.prompts(model)
    flops = STEPS * forward_flops(model, prompts)
    noise = torch.randn(1, *model.latent_shape(bench.resolution, bench.resolution), device=bench.device)
    pipeline = ZImagePipeline(
        scheduler=model.scheduler,
        vae=model.vae,
        text_encoder=None,
        tokenizer=None,
        transformer=to_diffusers(model.transformer, model.family),
    )
    pipeline.set_progress_bar_config(disable=True)

    def run_diffusers() -> object:
        return pipeline(
            prompt=None, prompt_embeds=[prompts.features[0].bfloat16()], latents=noise.clone(),
            height=bench.resolution, width=bench.resolution, num_inference_steps=STEPS, guidance_scale=0.0,
            output_type="pt",
        )  # fmt: skip

    def run_fewstep() -> Tensor:
        with model.denoiser.cache_text_tokens():
            return model.decode(sample_euler(model.denoiser, noise, model.sigmas(STEPS), prompts))

    table = Table(title=f"{STEPS} steps at {bench.resolution} px, one image, decoding included")
    for column in ("", "s/image", "speedup over diffusers", "TFLOP/s", "of the matrix rate", "peak, GB"):
        table.add_column(column, justify="left" if not column else "right")
    reference = 0.0

    def measure(name: str, run: Callable[[], object]) -> None:
        nonlocal reference
        bench.reset_memory()
        seconds = bench.time(run)
        reference = reference or seconds  # diffusers' pipeline is the first
        rate = flops / seconds
        cells = (f"{reference / seconds:.2f}", f"{rate / 1e12:.3g}", f"{rate / bench.matmul_rate:.0%}", bench.peak())
        table.add_row(name, f"{seconds:.3f}", *cells)

    measure("diffusers.ZImagePipeline, bf16", run_diffusers)
    measure("fewstep, bf16", run_fewstep)
    if bench.compiled:
        model.denoiser.compile_repeated_blocks()
        measure("fewstep, bf16, compiled", run_fewstep)
    quantize_fp8_(model.transformer, model.family.quantizable_modules)
    for products in (False, True) if supports_fp8_matmul(bench.device) else (False,):
        name = "fewstep, fp8 products" if products else "fewstep, fp8 weights"
        for module in model.transformer.modules():
            if isinstance(module, Fp8Linear):
                module.dynamic_activation_quant = products
        for block in model.denoiser.get_blocks():
            block.compute = block_forward
        measure(name, run_fewstep)
        if bench.compiled:
            model.denoiser.compile_repeated_blocks()
            measure(f"{name}, compiled", run_fewstep)
    return table


# --- iterations ------------------------------------------------------------------------------------------------------


def iteration_recipe(resolution: int, *more: str) -> DistillRecipe:
    """The first stage of the recipe for Z-Image, with one batch of one image in each update."""
    stages = load_recipe("zimage-turbo-8", [])
    assert isinstance(stages, StagesRecipe)
    changes = (f"resolution={resolution}", "train.gradient_accumulation_steps=1", "train.on_alert=off")
    recipe = with_overrides(stage_recipe(stages, stages.stages[0]), [*changes, *more])
    assert isinstance(recipe, DistillRecipe)
    return recipe


def iterations(bench: Bench) -> Table:
    """A Decoupled-DMD iteration: one update of the student, five of the fake score, optimizers included."""
    table = Table(title="a Decoupled-DMD iteration of a student of 8 steps, 5 fake-score updates, batch 1, bf16")
    for column in ("px", "models", "s/iteration", "TFLOP/s", "of the matrix rate", "peak, GB", "planned, GB"):
        table.add_column(column, justify="left" if column == "models" else "right")
    for resolution in (bench.resolution // 2, bench.resolution):
        for name, more in MODELS_VARIANTS.items():
            bench.reset_memory()
            recipe = iteration_recipe(resolution, *more)
            try:
                seconds, flops = measure_iterations(bench, recipe)
            except torch.OutOfMemoryError:
                table.add_row(str(resolution), name, "does not fit", "", "", "", planned(bench, recipe))
                continue
            rate = flops / seconds
            cells = (f"{seconds:.3f}", f"{rate / 1e12:.3g}", f"{rate / bench.matmul_rate:.0%}", bench.peak())
            table.add_row(str(resolution), name, *cells, planned(bench, recipe))
    return table


class PassCounter:
    """Counts the passes of all models on one image: a backward pass counts as two, and a recomputed block again."""

    def __init__(self, gradient_checkpointing: bool) -> None:
        self.passes, self.with_backward = 0, 3 + gradient_checkpointing

    def add(self, x: Tensor, trained: bool) -> None:
        self.passes += len(x) * (self.with_backward if trained and torch.is_grad_enabled() else 1)

    def watch(self, denoiser: nn.Module) -> None:
        """Count the passes of a trained denoiser."""
        denoiser.register_forward_pre_hook(lambda _, inputs: self.add(inputs[0], trained=True))


class CountedTeacher:
    """Counts the teacher's evaluations; a hook would count the adapters' too where all models share one base."""

    def __init__(self, denoiser: nn.Module, counter: PassCounter) -> None:
        self.denoiser, self.counter = denoiser, counter

    def __call__(self, x: Tensor, sigma: Tensor, prompts: EncodedPrompts) -> Tensor:
        self.counter.add(x, trained=False)
        velocity: Tensor = self.denoiser(x, sigma, prompts)
        return velocity


def count_passes(models: Models, counter: PassCounter) -> Models:
    """The same models, whose passes are counted."""
    for denoiser in (models.student.denoiser, *models.extra.values()):
        counter.watch(denoiser)
    teacher: TextToImagePipeline = copy.copy(models.teacher)
    teacher.denoiser = CountedTeacher(models.teacher.denoiser, counter)  # type: ignore[assignment]
    return replace(models, teacher=teacher)


def measure_iterations(bench: Bench, recipe: DistillRecipe) -> tuple[float, float]:
    """Mean seconds and operations of an iteration, over the same anchors for all models variants."""
    teacher = bench.model()
    teacher.set_size(recipe.resolution)
    prompts, null = bench.prompts(teacher), bench.prompts(teacher, tokens=10)
    flops = forward_flops(teacher, prompts)
    counter = PassCounter(recipe.models.gradient_checkpointing)
    models = count_passes(build_models(recipe, teacher, recipe.method.extra_models()), counter)
    method = DMD.build(MethodSetup(recipe, models, null, {}, [], DistContext(device=bench.device)))
    method.before_step(recipe.train.steps - 1)  # CA and DM have a weight, which they have not at the first steps
    learners = [TrainState(part, recipe.optim[part.name], recipe.train) for part in method.trainables]
    shape = teacher.latent_shape(teacher.generation_config.height, teacher.generation_config.width)

    def iteration(seed: int) -> None:
        torch.manual_seed(seed)
        for learner in learners:
            for _ in range(learner.trainable.updates_per_step):
                learner.update([DistillBatch(torch.randn(1, *shape, device=bench.device), prompts)], seed + 1)
                for other in learners:
                    other.optimizer.zero_grad()

    times = []
    for seed in range(bench.repeats + 1):
        if seed == 1:  # the first iteration makes the optimizer states; neither its passes nor its memory count
            counter.passes = 0
            bench.reset_memory()
        bench.synchronize()
        start = time.perf_counter()
        iteration(seed)
        bench.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.mean(times[1:]), flops * counter.passes / bench.repeats


def planned(bench: Bench, recipe: DistillRecipe) -> str:
    """The planned memory in GB, for a table."""
    return f"{sum(plan(recipe).memory.values()) / 1e9:.1f}" if bench.device.type == "cuda" else "–"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--only", choices=["images", "iterations"])
    parser.add_argument("--full", action="store_true", help="the large model on a CPU too")
    parser.add_argument("--resolution", type=int, help="pixels of a side")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    full = arguments.full or device.type == "cuda"
    bench = Bench(device, arguments.repeats, arguments.compile, full, arguments.resolution)
    console = Console(soft_wrap=True)
    rate = f"a large matrix product in bf16: {bench.matmul_rate / 1e12:.3g} TFLOP/s"
    console.print(f"{bench.parameters() / 1e6:,.1f}e6 parameters; {rate}")
    for name, measure in (("images", images), ("iterations", iterations)):
        if arguments.only in (None, name):
            try:
                console.print(measure(bench))
            except UserError as error:
                console.print(f"{name}: {error}")


if __name__ == "__main__":
    main()
