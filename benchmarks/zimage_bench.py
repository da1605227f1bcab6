"""Z-Image's shape with random weights, and how ``zimage.py`` measures time, memory and arithmetic on it."""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fewstep
from fewstep.core.conditioning import EncodedPrompts
from fewstep.models.family import get_family
from fewstep.models.generation_config import GenerationConfig
from fewstep.models.pipeline import TextToImagePipeline

ZIMAGE = Path(fewstep.__file__).parent / "assets" / "zimage"
TINY = {"dim": 192, "n_layers": 4, "n_heads": 4, "n_kv_heads": 4, "axes_dims": [16, 16, 16], "cap_feat_dim": 64}
TINY_VAE = {"block_out_channels": [16, 16, 32, 32], "norm_num_groups": 8, "layers_per_block": 1}
STEPS, TOKENS = 8, 64


class Bench:
    """Where and at what resolution to measure.

    Attributes:
        matmul_rate: operations per second of a large matrix product in bf16.
    """

    def __init__(self, device: torch.device, repeats: int, compiled: bool, full: bool, resolution: int | None) -> None:
        self.device, self.repeats, self.compiled, self.full = device, repeats, compiled, full
        self.resolution = resolution or (1024 if full else 128)
        self.matmul_rate = self.measure_matmul_rate()

    def configs(self) -> dict[str, dict[str, object]]:
        configs = {part: json.loads((ZIMAGE / part / "config.json").read_text()) for part in ("transformer", "vae")}
        if not self.full:
            configs["transformer"] |= TINY
            configs["vae"] |= TINY_VAE
        return configs

    def parameters(self) -> int:
        """Number of the transformer's parameters."""
        with torch.device("meta"):
            transformer = ZImageTransformer2DModel.from_config(self.configs()["transformer"])
        return sum(p.numel() for p in transformer.parameters())

    def model(self) -> TextToImagePipeline:
        """A model with random weights in bf16, without a text encoder."""
        configs = self.configs()
        torch.manual_seed(0)
        with self.device, _default_dtype(torch.bfloat16):
            transformer = ZImageTransformer2DModel.from_config(configs["transformer"])
            vae = AutoencoderKL.from_config(configs["vae"])
        for module in (transformer, vae):
            module.eval().requires_grad_(False)
        scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0)
        generation_config = GenerationConfig(steps=STEPS, height=self.resolution, width=self.resolution)
        components = {
            "transformer": transformer, "vae": vae, "text_encoder": nn.Identity(), "tokenizer": None,
            "scheduler": scheduler,
        }  # fmt: skip
        return TextToImagePipeline(get_family("ZImagePipeline"), components, generation_config)

    def prompts(self, model: TextToImagePipeline, tokens: int = TOKENS) -> EncodedPrompts:
        """One random encoded prompt."""
        width = model.family.prompt_features(model.components)
        return EncodedPrompts(torch.randn(1, tokens, width, device=self.device), torch.full((1,), tokens))

    def time(self, run: Callable[[], object]) -> float:
        """Seconds of a run: the median of the repeats, after one that warms up."""
        each = []
        for _ in range(self.repeats + 1):
            self.synchronize()
            start = time.perf_counter()
            run()
            self.synchronize()
            each.append(time.perf_counter() - start)
        return statistics.median(each[1:])

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def reset_memory(self) -> None:
        """Free unused memory and start a new measurement of the peak."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> str:
        """Peak memory in GB, for a table."""
        return f"{torch.cuda.max_memory_allocated() / 1e9:.1f}" if self.device.type == "cuda" else "–"

    def measure_matmul_rate(self) -> float:
        side = 8192 if self.device.type == "cuda" else 1024
        a, b = (torch.randn(side, side, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        return 2 * side**3 / self.time(lambda: a @ b)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def forward_flops(model: TextToImagePipeline, prompts: EncodedPrompts) -> float:
    """Floating point operations of one forward pass on one image."""
    shape = model.latent_shape(model.generation_config.height, model.generation_config.width)
    x = torch.randn(1, *shape, device=model.device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.denoiser(x, torch.ones(1, device=model.device), prompts)
    return float(counter.get_total_flops())
