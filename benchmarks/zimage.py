"""Z-Image's shape with random weights: seconds an image beside diffusers' pipeline, and of a Decoupled-DMD iteration.

On a GPU at full size (6.15e9 parameters, 1024 px), on a CPU the same code with a tiny model, or with --full the large
one at a --size that a CPU can wait for. Weights do not matter to speed or memory, so none are downloaded. Each figure
of time is the median of some repeats after a warm-up.

    python benchmarks/zimage.py [--device cuda] [--repeats 5] [--no-compile] [--only images|iterations]
    python benchmarks/zimage.py --device cpu --full --size 128 --repeats 1 --no-compile --only images
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fewstep
from fewstep.config.load import load_recipe, with_overrides
from fewstep.config.recipe import DistillRecipe, StagesRecipe
from fewstep.core.conditioning import EncodedPrompts
from fewstep.core.samplers import sample_euler
from fewstep.data.batch import DistillBatch
from fewstep.errors import UserError
from fewstep.export.diffusers import to_diffusers
from fewstep.jobs import dmd_config
from fewstep.methods.dmd.method import DecoupledDMD
from fewstep.methods.models_setup import build_models
from fewstep.models.family import get_family
from fewstep.models.generation_config import GenerationConfig
from fewstep.models.pipeline import TextToImagePipeline
from fewstep.models.quantize import Fp8Linear, quantize_fp8_, supports_fp8_matmul
from fewstep.models.zimage.block import block_forward
from fewstep.plan.estimate import plan
from fewstep.stages import stage_recipe
from fewstep.training.train_state import TrainState

ZIMAGE = Path(fewstep.__file__).parent / "assets" / "zimage"
TINY = {"dim": 192, "n_layers": 4, "n_heads": 4, "n_kv_heads": 4, "axes_dims": [16, 16, 16], "cap_feat_dim": 64}
TINY_VAE = {"block_out_channels": [16, 16, 32, 32], "norm_num_groups": 8, "layers_per_block": 1}
STEPS, TOKENS = 8, 64


class Bench:
    """Where and at what size to measure."""

    def __init__(self, device: torch.device, repeats: int, compiled: bool, full: bool, size: int | None) -> None:
        self.device, self.repeats, self.compiled, self.full = device, repeats, compiled, full
        self.size = size or (1024 if full else 128)
        self.rate = self.matrix_rate()

    def configs(self) -> dict[str, dict[str, object]]:
        configs = {part: json.loads((ZIMAGE / part / "config.json").read_text()) for part in ("transformer", "vae")}
        if not self.full:
            configs["transformer"] |= TINY
            configs["vae"] |= TINY_VAE
        return configs

    def parameters(self) -> int:
        with torch.device("meta"):
            return sum(
                p.numel() for p in ZImageTransformer2DModel.from_config(self.configs()["transformer"]).parameters()
            )

    def model(self) -> TextToImagePipeline:
        """A model with random weights in bf16, without a text encoder."""
        configs = self.configs()
        torch.manual_seed(0)
        with self.device, _dtype(torch.bfloat16):
            transformer = ZImageTransformer2DModel.from_config(configs["transformer"])
            vae = AutoencoderKL.from_config(configs["vae"])
        for module in (transformer, vae):
            module.eval().requires_grad_(False)
        scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0)
        generation_config = GenerationConfig(steps=STEPS, height=self.size, width=self.size)
        components = {
            "transformer": transformer, "vae": vae, "text_encoder": nn.Identity(), "tokenizer": None,
            "scheduler": scheduler,
        }  # fmt: skip
        return TextToImagePipeline(get_family("ZImagePipeline"), components, generation_config)

    def prompts(self, model: TextToImagePipeline, count: int = 1, tokens: int = TOKENS) -> EncodedPrompts:
        wide = model.family.prompt_features(model.components)
        lengths = torch.full((count,), tokens)
        return EncodedPrompts(torch.randn(count, tokens, wide, device=self.device), lengths)

    def time(self, run: Callable[[], object]) -> float:
        """Seconds, the median of the repeats after one that warms up."""
        each = []
        for _ in range(self.repeats + 1):
            self.wait()
            start = time.perf_counter()
            run()
            self.wait()
            each.append(time.perf_counter() - start)
        return statistics.median(each[1:])

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def forget(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> str:
        return f"{torch.cuda.max_memory_allocated() / 1e9:.1f}" if self.device.type == "cuda" else "–"

    def matrix_rate(self) -> float:
        """Operations a second of a large matrix product in bf16: what there is to be had."""
        side = 8192 if self.device.type == "cuda" else 1024
        a, b = (torch.randn(side, side, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        return 2 * side**3 / self.time(lambda: a @ b)


@contextmanager
def _dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def forward_flops(model: TextToImagePipeline, prompts: EncodedPrompts) -> float:
    x = torch.randn(
        1, *model.latent_shape(model.generation_config.height, model.generation_config.width), device=model.device
    )
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.denoiser(x, torch.ones(1, device=model.device), prompts)
    return float(counter.get_total_flops())


@torch.no_grad()
def images(bench: Bench) -> Table:
    """One image of 8 steps without guidance, decoded."""
    model = bench.model()
    prompts = bench.prompts(model)
    flops = STEPS * forward_flops(model, prompts)
    noise = torch.randn(1, *model.latent_shape(bench.size, bench.size), device=bench.device)
    pipeline = ZImagePipeline(
        scheduler=model.scheduler,
        vae=model.vae,
        text_encoder=None,
        tokenizer=None,
        transformer=to_diffusers(model.transformer, model.family),
    )
    pipeline.set_progress_bar_config(disable=True)

    def theirs() -> object:
        return pipeline(
            prompt=None, prompt_embeds=[prompts.features[0].bfloat16()], latents=noise.clone(), height=bench.size,
            width=bench.size, num_inference_steps=STEPS, guidance_scale=0.0, output_type="pt",
        )  # fmt: skip

    def ours() -> Tensor:
        with model.denoiser.cache_text_tokens():
            return model.decode(sample_euler(model.denoiser, noise, model.sigmas(STEPS), prompts))

    arms: list[tuple[str, Callable[[], object]]] = [("diffusers.ZImagePipeline, bf16", theirs), ("fewstep, bf16", ours)]
    table = Table(title=f"{STEPS} steps at {bench.size} px, one image, decoding included")
    for column in ("", "s/image", "times diffusers' speed", "TFLOP/s", "of the matrix rate", "peak, GB"):
        table.add_column(column, justify="left" if not column else "right")
    plain = 0.0

    def measure(name: str, run: Callable[[], object]) -> None:
        nonlocal plain
        bench.forget()
        seconds = bench.time(run)
        plain = plain or seconds
        rate = flops / seconds
        cells = (f"{plain / seconds:.2f}", f"{rate / 1e12:.3g}", f"{rate / bench.rate:.0%}", bench.peak())
        table.add_row(name, f"{seconds:.3f}", *cells)

    for name, run in arms:
        measure(name, run)
    if bench.compiled:
        model.denoiser.compile_repeated_blocks()
        measure("fewstep, bf16, compiled", ours)
    quantize_fp8_(model.transformer, model.family.quantizable_modules)
    for products in (False, True) if supports_fp8_matmul(bench.device) else (False,):
        name = "fewstep, fp8 products" if products else "fewstep, fp8 weights"
        for module in model.transformer.modules():
            if isinstance(module, Fp8Linear):
                module.dynamic_activation_quant = products
        for block in model.denoiser.get_blocks():
            block.compute = block_forward
        measure(name, ours)
        if bench.compiled:
            model.denoiser.compile_repeated_blocks()
            measure(f"{name}, compiled", ours)
    return table


def iteration_recipe(size: int, *more: str) -> DistillRecipe:
    """One batch of one image, of the recipe for Z-Image."""
    phases = load_recipe("zimage-turbo-8", [])
    assert isinstance(phases, StagesRecipe)
    recipe = with_overrides(
        stage_recipe(phases, phases.stages[0]), [f"size={size}", "train.gradient_accumulation_steps=1", *more]
    )
    assert isinstance(recipe, DistillRecipe)
    return recipe


def iterations(bench: Bench) -> Table:
    """A Decoupled-DMD iteration: the student's move and the fake's five, optimizers included."""
    table = Table(title="a Decoupled-DMD iteration of a student of 8 steps, 5 updates of the fake, batch 1, bf16")
    for column in ("px", "roles", "s/iteration", "TFLOP/s", "of the matrix rate", "peak, GB", "planned, GB"):
        table.add_column(column, justify="left" if column == "roles" else "right")
    arms = {
        "LoRA on one base, fp8": ("roles.base=fp8",),
        "LoRA on one base, bf16": ("roles.base=bf16",),
        "three copies": ("roles.kind=copies", "roles.base=bf16"),
    }
    for size in (bench.size // 2, bench.size):
        for name, more in arms.items():
            bench.forget()
            recipe = iteration_recipe(size, *more)
            try:
                seconds, flops = one_arm(bench, recipe)
            except torch.OutOfMemoryError:
                table.add_row(str(size), name, "does not fit", "", "", "", planned(bench, recipe))
                continue
            rate = flops / seconds
            cells = (f"{seconds:.3f}", f"{rate / 1e12:.3g}", f"{rate / bench.rate:.0%}", bench.peak())
            table.add_row(str(size), name, *cells, planned(bench, recipe))
    return table


def one_arm(bench: Bench, recipe: DistillRecipe) -> tuple[float, float]:
    """Mean seconds and operations of an iteration, over the same anchors for every arm."""
    teacher = bench.model()
    teacher.generation_config = teacher.generation_config.model_copy(
        update={"height": recipe.size, "width": recipe.size}
    )
    prompts, null = bench.prompts(teacher), bench.prompts(teacher, tokens=10)
    each = forward_flops(teacher, prompts)
    roles = build_models(recipe, teacher)
    student, fake = roles.student.denoiser, roles.fake
    done = [0.0]

    def count(_: nn.Module, inputs: tuple[Tensor, ...], learns: bool) -> None:
        passes = (3 + recipe.gradient_checkpointing) if learns and torch.is_grad_enabled() else 1
        done[0] += passes * len(inputs[0]) * each

    for role, learns in ((student, True), (fake, True)):
        role.register_forward_pre_hook(lambda m, i, learns=learns: count(m, i, learns))
    asked = Counting(teacher.denoiser, lambda inputs: count(teacher.denoiser, inputs, False))
    method = DecoupledDMD(asked, student, fake, null, dmd_config(recipe, teacher.shift))
    optim = {"student": recipe.optim.student, "fake": recipe.optim.fake}
    learners = [TrainState(trainable, optim[trainable.name], recipe.train) for trainable in method.trainables]  # type: ignore[arg-type]
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
        if seed == 1:  # states are made, and nothing of what made them counts
            done[0] = 0.0
            bench.forget()
        bench.wait()
        start = time.perf_counter()
        iteration(seed)
        bench.wait()
        times.append(time.perf_counter() - start)
    return statistics.mean(times[1:]), done[0] / bench.repeats


class Counting:
    """A teacher that says when it is asked."""

    def __init__(self, denoiser: nn.Module, told: Callable[[tuple[Tensor, ...]], None]) -> None:
        self.denoiser, self.told = denoiser, told

    def __call__(self, x: Tensor, sigma: Tensor, prompts: EncodedPrompts) -> Tensor:
        self.told((x,))
        answer: Tensor = self.denoiser(x, sigma, prompts)
        return answer


def planned(bench: Bench, recipe: DistillRecipe) -> str:
    return f"{sum(plan(recipe).memory.values()) / 1e9:.1f}" if bench.device.type == "cuda" else "–"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--only", choices=["images", "iterations"])
    parser.add_argument("--full", action="store_true", help="the large model on a CPU too")
    parser.add_argument("--size", type=int, help="pixels of a side")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    full = arguments.full or device.type == "cuda"
    bench = Bench(device, arguments.repeats, arguments.compile, full, arguments.size)
    console = Console(soft_wrap=True)
    rate = f"a large matrix product in bf16: {bench.rate / 1e12:.3g} TFLOP/s"
    console.print(f"{bench.parameters() / 1e6:,.1f}e6 parameters; {rate}")
    for name, measured in (("images", images), ("iterations", iterations)):
        if arguments.only in (None, name):
            try:
                console.print(measured(bench))
            except UserError as error:
                console.print(f"{name}: {error}")


if __name__ == "__main__":
    main()
