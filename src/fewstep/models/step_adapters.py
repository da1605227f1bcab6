"""Students with a LoRA adapter for each step: which adapter computes a step, and their files.

A student of few steps does different work at each: the first step makes the layout of pure noise, the last one detail.
Parameters of its own for each step are as in arXiv 2606.12575, known second hand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from fewstep.core.conditioning import EncodedPrompts
from fewstep.core.denoiser import MIDDLE
from fewstep.errors import UserError
from fewstep.models.adapter_files import WEIGHTS_FILE, read_adapter, set_adapter
from fewstep.models.adapters import AdapterDenoiser, active_adapters, add_adapter
from fewstep.models.denoiser import TransformerDenoiser
from fewstep.models.generation_config import load_generation_config
from fewstep.models.layer_cache import CacheSettings

STEP_LORAS = "step_loras"  # in a student's folder: a folder for each step, by its number from 1


def step_adapters(name: str, count: int) -> list[str]:
    """The names of the adapters of ``count`` steps."""
    return [f"{name}_{step}" for step in range(1, count + 1)]


class StepAdapterDenoiser(AdapterDenoiser):
    """A denoiser that is the shared base with the adapter of the step that a sample's noise level belongs to.

    Its parameters are those of all adapters. A level between those of the steps belongs to the nearest one.

    Args:
        adapters: names, one for each step.
        sigmas: the steps' noise levels, descending from 1; a terminal 0 is ignored.
    """

    def __init__(self, base: TransformerDenoiser, adapters: Sequence[str], sigmas: Sequence[float]) -> None:
        super().__init__(base, dict.fromkeys(adapters, 1.0))
        self.names, self.levels = list(adapters), list(sigmas[: len(adapters)])

    def forward(self, x: Tensor, sigma: Tensor, prompts: EncodedPrompts) -> Tensor:
        return self._by_step(self.base, x, sigma, prompts)

    def features(self, x: Tensor, sigma: Tensor, prompts: EncodedPrompts, depths: Sequence[float] = MIDDLE) -> Tensor:
        return self._by_step(
            lambda *inputs: self.base.features(inputs[0], inputs[1], inputs[2], depths), x, sigma, prompts
        )

    def _by_step(self, compute: Callable[..., Tensor], x: Tensor, sigma: Tensor, prompts: EncodedPrompts) -> Tensor:
        """What ``compute`` returns, [B, ...], each sample's with the adapter of its step."""
        levels = torch.tensor(self.levels, device=sigma.device)
        steps = (sigma.float()[:, None] - levels).abs().argmin(1)
        # a plan's tensors have no values; every step costs the same
        chosen = [0] if steps.is_meta else sorted(set(steps.tolist()))
        if len(chosen) == 1:
            with active_adapters(self.base.transformer, {self.names[chosen[0]]: 1.0}):
                return compute(x, sigma, prompts)
        rows, parts = [steps.eq(step).nonzero()[:, 0] for step in chosen], []
        for step, own in zip(chosen, rows, strict=True):
            with active_adapters(self.base.transformer, {self.names[step]: 1.0}):
                parts.append(compute(x[own], sigma[own], prompts[own]))
        return torch.cat(parts)[torch.cat(rows).argsort()]

    def compile_repeated_blocks(self) -> None:
        """As the base's; each block has a graph for each adapter."""
        self.base.compile_repeated_blocks()

    def cache_text_tokens(self) -> AbstractContextManager[None]:
        """Caches nothing: the adapters change between steps, and the text's tokens with them."""
        return nullcontext()

    def reuse_layers(self, settings: CacheSettings | None) -> AbstractContextManager[None]:
        """Raises: UserError if there are settings: the steps have different weights."""
        if settings is not None:
            raise UserError(f"cache {settings.method}: this student has a LoRA for each step, whose layers differ")
        return nullcontext()


def add_step_loras(transformer: nn.Module, folder: Path, count: int) -> list[str]:
    """Add the adapters in a student's folder to its transformer, which must not be quantized yet.

    Returns:
        Their names, one for each step.

    Raises:
        UserError: a file is missing or damaged, or of another model.
    """
    names = step_adapters("step", count)
    for number, name in enumerate(names, start=1):
        file = folder / STEP_LORAS / str(number) / WEIGHTS_FILE
        weights = read_adapter(file)
        layers = [key.removesuffix(".lora_A.weight") for key in weights if key.endswith(".lora_A.weight")]
        ranks = {len(tensor) for key, tensor in weights.items() if key.endswith(".lora_A.weight")}
        if len(ranks) != 1:
            raise UserError(f"{file}: expected LoRA weights of one rank")
        add_adapter(transformer, name, ranks.pop(), target_modules=layers)
        if not set_adapter(transformer, name, weights):
            raise UserError(f"{file}: its layers or shapes are not those of the model in {folder}")
    return names


def has_step_loras(folder: Path) -> bool:
    """Whether a model's folder is that of a student with a LoRA for each step."""
    return (folder / STEP_LORAS).is_dir() and load_generation_config(folder).step_loras


def check_one_transformer(folder: Path, key: str) -> None:
    """Check that a model's transformer is all that computes its steps.

    Raises:
        UserError: it has a LoRA for each step; the message begins with ``key``.
    """
    if has_step_loras(folder):
        raise UserError(
            f"{key}: {folder} is a student with a LoRA for each step, which one transformer cannot hold; it can be "
            "sampled, served and evaluated, and init can start a recipe with models.lora_per_step from it"
        )
