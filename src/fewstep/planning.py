"""What a distillation will need, before any weight is loaded: memory by component, forwards, arithmetic, time.

The model is made on torch's meta device, where tensors have shapes and no contents: parameters are counted there, what
a backward pass would keep is counted as autograd asks for it, and so are the operations.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import AutoencoderKL, ZImageTransformer2DModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3Config, Qwen3Model

from fewstep.errors import UserError
from fewstep.models.adapters import add_stack, stack_parameters
from fewstep.models.fp8 import matrices
from fewstep.models.parts import find, read_config
from fewstep.models.pipeline import read_card
from fewstep.models.prompts import EncodedPrompts
from fewstep.models.vae import downscale
from fewstep.models.zimage import PATCH, ZImageDenoiser, padded
from fewstep.recipes.schema import DistillRecipe
from fewstep.recipes.settings import OptimSettings
from fewstep.training.scaling import Size, calls

#: Teachers whose configuration ships, so that they can be planned for before they are downloaded.
KNOWN = {f"Tongyi-MAI/{name}": Path(__file__).parent / "assets" / "zimage" for name in ("Z-Image", "Z-Image-Turbo")}

PROMPT_TOKENS = 64  # a prompt of some 40 words, with the chat template


@dataclass(frozen=True)
class Gpu:
    """bytes: of memory. flops: dense matrix products a second in bf16, as the maker states them."""

    bytes: float
    flops: float


GPUS = {
    "rtx3090": Gpu(24e9, 71e12),
    "rtx4090": Gpu(24e9, 165e12),
    "rtx5090": Gpu(32e9, 210e12),
    "l40s": Gpu(48e9, 362e12),
    "a100-40": Gpu(40e9, 312e12),
    "a100-80": Gpu(80e9, 312e12),
    "h100": Gpu(80e9, 989e12),
    "h200": Gpu(141e9, 989e12),
    "b200": Gpu(192e9, 2250e12),
}
REACHED = 0.4  # of the stated rate, in the times that are printed: a guess, and said to be one

#: What can be turned on to need less, in the order in which it is proposed.
SAVERS = (
    "gradient_checkpointing=true",
    "roles.base=bf16",
    "roles.kind=lora",
    "roles.base=fp8",
    "optim.student.bits=8",
    "optim.fake.bits=8",
)


@dataclass
class Plan:
    """What a distillation needs of each GPU.

    Attributes:
        memory: bytes by component; their sum is what is held at the worst moment of a step.
        beforehand: the same, while the teacher is loaded, prompts are encoded and roles made.
        forwards, backwards: of denoisers in a step, mean over the anchors.
        flops: floating point operations of a step.
    """

    parameters: int
    height: int
    width: int
    memory: dict[str, float] = field(default_factory=dict)
    beforehand: dict[str, float] = field(default_factory=dict)
    forwards: float = 0.0
    backwards: float = 0.0
    flops: float = 0.0

    @property
    def total(self) -> float:
        return max(sum(self.memory.values()), sum(self.beforehand.values()))

    def fits(self, gpu: Gpu) -> bool:
        """Whether there is a twentieth to spare."""
        return self.total < 0.95 * gpu.bytes


def plan(recipe: DistillRecipe, gpus: int = 1) -> Plan:
    """The plan of a recipe: of each of ``gpus`` GPUs, which share the weights.

    Raises:
        UserError: there is no such teacher, or its configuration cannot be read.
    """
    folder = KNOWN.get(recipe.teacher) or find(recipe.teacher)
    card = read_card(folder)
    height, width = (recipe.size or card.height), (recipe.size or card.width)
    frozen, lora = (4 if recipe.roles.base == "fp32" else 2), recipe.roles.kind == "lora"
    with torch.device("meta"):
        transformer = ZImageTransformer2DModel.from_config(read_config(folder, "transformer"))
        vae = AutoencoderKL.from_config(read_config(folder, "vae"))
        text_encoder = Qwen3Model(Qwen3Config(**read_config(folder, "text_encoder")))
    size, layout = _count(transformer), Size.of(transformer)
    base = float(frozen * size)
    if recipe.roles.base == "fp8":
        # of bf16's two bytes one goes, and each row gets a scale
        base -= sum(linear.weight.numel() - 4 * linear.out_features for linear in matrices(transformer).values())
    learn = {"student": size, "fake": size}
    if lora:
        ranks = {"student": recipe.roles.rank, "fake": recipe.roles.fake_rank or recipe.roles.rank}
        with torch.device("meta"):
            for name, rank in ranks.items():
                add_stack(transformer, name, rank, recipe.roles.scale, recipe.roles.targets)
        learn = {name: sum(p.numel() for p in stack_parameters(transformer, name).values()) for name in ranks}
    if recipe.method != "dmd" or not (recipe.shield.enabled and recipe.shield.weight):
        learn.pop("fake")
    optims = {name: getattr(recipe.optim, name) for name in learn}

    latent = downscale(vae)
    batch = -(-recipe.train.batch_size // gpus)  # of each
    shape = (batch, transformer.in_channels, height // latent, width // latent)
    nn.Module.to(transformer, torch.bfloat16)  # not diffusers' own, which warns of real weights
    kept, flops = _forward(ZImageDenoiser(transformer), shape, recipe.gradient_checkpointing)

    found = Plan(size, height, width)
    shared = {
        "base" if lora else "teacher": base,
        **{f"{name}'s weights": 4.0 * count for name, count in learn.items()},
        "gradients": 4.0 * max(learn.values()),
        **{f"{name}'s AdamW": count * _moments(optims[name]) for name, count in learn.items()},
        **{f"{name}'s moving average": 4.0 * count for name, count in learn.items() if optims[name].ema is not None},
    }
    found.memory = {name: bytes / gpus for name, bytes in shared.items() if bytes}
    if gpus > 1:
        bf16 = recipe.train.precision != "fp32"
        found.memory["gathered"] = (2.0 if bf16 else 4.0) * (2 * layout.block + layout.root)
    else:  # autocast keeps a bf16 copy of what learns as long as its loss is computed
        found.memory["bf16 copies"] = 2.0 * max(learn.values())
    found.memory["kept for the backward pass"] = kept
    found.beforehand = {
        "teacher": float(frozen * size),
        "text encoder": float(frozen * _count(text_encoder)),
        "autoencoder": float(frozen * _count(vae)),
    }
    if not lora:  # a copy, before it is shared out
        found.beforehand["copies"] = 4.0 * size * (1 + (len(learn) - 1) / gpus)
    if recipe.method == "dmd":
        step = calls(recipe.student.steps, recipe.fake_updates if "fake" in learn else 0)
        found.forwards, found.backwards = step.forwards, step.backwards
        teacher = 3  # the teacher's one call has three times the batch
    else:
        found.forwards, found.backwards, teacher = recipe.student.steps, recipe.student.steps, 1
    again = found.backwards if recipe.gradient_checkpointing else 0
    found.flops = flops * (found.forwards + teacher - 1 + 2 * found.backwards + again)
    found.flops *= recipe.train.accumulate
    return found


def parse_gpu(text: str) -> Gpu:
    """A GPU's name, or its memory such as "24GB". Raises: UserError."""
    if text.lower() in GPUS:
        return GPUS[text.lower()]
    try:
        return Gpu(float(text.lower().removesuffix("gb")) * 1e9, 0.0)
    except ValueError:
        raise UserError(f"--gpu {text}: give a size such as 24GB, or one of {', '.join(GPUS)}") from None


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _moments(optim: OptimSettings) -> float:
    """Bytes of AdamW's two moments for a parameter; of 8 bits, with a scale for every 256."""
    return 8.0 if optim.bits == 32 else 2 * (1 + 4 / 256)


def _forward(denoiser: ZImageDenoiser, shape: tuple[int, ...], checkpointed: bool) -> tuple[float, float]:
    """Bytes that one forward with gradient keeps, and its operations; nothing is computed.

    With checkpointing each block keeps its input alone, but for the one that is being run again.
    """
    batch, _, rows, columns = shape
    caption = padded(PROMPT_TOKENS)
    wide = denoiser.transformer.config["cap_feat_dim"]
    prompts = EncodedPrompts(
        torch.empty(batch, PROMPT_TOKENS, wide, device="meta"),
        torch.full((batch,), PROMPT_TOKENS, device="meta"),
    )
    weights = {p.untyped_storage()._cdata for p in denoiser.parameters()}
    inputs, inside, compute = list[float](), list[float](), denoiser.run_block

    with _kept(weights) as kept, FlopCounterMode(display=False) as counter:

        def run(block: nn.Module, x: Tensor, *more: Tensor) -> Tensor:
            before = kept.bytes
            out = compute(block, x, *more)  # type: ignore[arg-type]
            inputs.append(float(x.numel() * x.element_size()))
            inside.append(kept.bytes - before)
            return out

        denoiser.run_block = run  # type: ignore[assignment]
        if rows % PATCH or columns % PATCH:
            raise UserError(f"latents of {rows}x{columns} cannot be cut into patches of {PATCH}")
        x = torch.empty(*shape, device="meta", requires_grad=True)
        denoiser._velocity(x, torch.empty(batch, device="meta"), prompts, caption)
    if checkpointed:
        return sum(inputs) + max(inside) + kept.bytes - sum(inside), float(counter.get_total_flops())
    return kept.bytes, float(counter.get_total_flops())


class _Kept:
    """Bytes of what autograd has kept so far; a storage that it keeps twice counts once."""

    def __init__(self, weights: set[int]) -> None:
        self.bytes, self._seen = 0.0, weights
        self._alive: list[Tensor] = []

    def add(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self._alive.append(tensor)  # or its storage's place would be given to another
            self.bytes += storage.nbytes()
        return tensor


@contextmanager
def _kept(weights: set[int]) -> Iterator[_Kept]:
    kept = _Kept(set(weights))
    with torch.autograd.graph.saved_tensors_hooks(kept.add, lambda tensor: tensor):
        yield kept
