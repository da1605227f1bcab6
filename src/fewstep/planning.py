"""What a distillation will need, before any weight is loaded: memory by component, forwards, arithmetic, time.

The roles are made on torch's meta device, where tensors have shapes and no contents, and the method's own losses are
run there, with their backward passes: what is alive at the worst moment is counted (``footprint.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from diffusers import AutoencoderKL, ZImageTransformer2DModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3Config, Qwen3Model

from fewstep.distill.batch import DistillBatch
from fewstep.distill.dmd import DecoupledDmd
from fewstep.distill.roles import Roles, make_roles
from fewstep.distill.run import settings_of
from fewstep.distill.trajectory import astray
from fewstep.errors import UserError
from fewstep.footprint import Alive, AsOn
from fewstep.generate import DECODED, at_once
from fewstep.models.adapters import as_now
from fewstep.models.parts import find, load_part, read_config
from fewstep.models.pipeline import TextToImage, read_card
from fewstep.models.prompts import AT_ONCE, EncodedPrompts
from fewstep.models.vae import decode_latents
from fewstep.models.zimage import ZImageDenoiser
from fewstep.recipes.schema import DistillRecipe
from fewstep.recipes.settings import OptimSettings
from fewstep.training.scaling import Size, calls

#: Teachers whose configuration ships, so that they can be planned for before they are downloaded.
KNOWN = {f"Tongyi-MAI/{name}": Path(__file__).parent / "assets" / "zimage" for name in ("Z-Image", "Z-Image-Turbo")}

STEP = "in a step"
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
        moments: bytes by component at each time that may be the worst, by what is done then.
        forwards, backwards: of denoisers in a step, mean over the anchors.
        flops: floating point operations of a step.
    """

    parameters: int
    height: int
    width: int
    moments: dict[str, dict[str, float]] = field(default_factory=dict)
    forwards: float = 0.0
    backwards: float = 0.0
    flops: float = 0.0

    @property
    def total(self) -> float:
        return max(sum(parts.values()) for parts in self.moments.values())

    @property
    def memory(self) -> dict[str, float]:
        """What a step takes, by component."""
        return self.moments[STEP]

    def fits(self, gpu: Gpu) -> bool:
        """Whether there is a twentieth to spare."""
        return self.total < 0.95 * gpu.bytes


def plan(recipe: DistillRecipe, gpus: int = 1, kind: Literal["cuda", "cpu"] = "cuda") -> Plan:
    """The plan of a recipe: of each of ``gpus`` GPUs, which share the weights.

    Args:
        kind: of device, whose kernels and autocast are reckoned with.

    Raises:
        UserError: there is no such teacher, or its configuration cannot be read.
    """
    teacher = _on_meta(recipe)
    card, whole = teacher.card, _bytes(teacher.transformer)
    text_encoder = {"text encoder": _bytes(teacher.text_encoder), "what its layers say": _encoding(teacher)}
    found = Plan(_count(teacher.transformer), card.height, card.width)
    layout = Size.of(teacher.transformer)
    with (
        _quietly_random(),
        torch.device("meta"),
    ):  # blocks are checkpointed later, with what stands for the device around them
        roles = make_roles(recipe.model_copy(update=_LATER), teacher)
    learn = {"student": _count(roles.student.denoiser), "fake": _count(roles.fake)}
    if recipe.method != "dmd" or not (recipe.shield.enabled and recipe.shield.weight):
        learn.pop("fake")
    optims = {name: getattr(recipe.optim, name) for name in learn}
    bf16 = recipe.train.precision != "fp32" if kind == "cuda" else recipe.train.precision == "bf16"

    base = "base" if roles.shared else "teacher"
    stacks = sum(learn.values()) * 4.0 if roles.shared else 0.0
    weights = {
        base: _bytes(teacher.transformer) - stacks,
        **{f"{name}'s {'adapters' if roles.shared else 'weights'}": 4.0 * count for name, count in learn.items()},
    }
    states = {
        "gradients": 4.0 * max(learn.values()),
        **{f"{name}'s AdamW": count * _moments(optims[name]) for name, count in learn.items()},
        **{f"{name}'s moving average": 4.0 * count for name, count in learn.items() if optims[name].ema is not None},
    }
    shared = {name: bytes / gpus for name, bytes in {**weights, **states}.items() if bytes}
    if gpus > 1:
        shared["gathered"] = (2.0 if bf16 else 4.0) * (2 * layout.block + layout.root)
        if bf16:  # what is gathered is in bf16 already
            for module in (roles.student.denoiser, roles.fake):
                nn.Module.to(module, torch.bfloat16)
    with _quietly_random():
        job = _Job(recipe, roles, -(-recipe.train.batch_size // gpus), kind, bf16)
        found.moments = {
            "while the teacher is loaded": {"teacher": whole} | (text_encoder if recipe.asks_teacher_first else {}),
            "while prompts are encoded": {name: bytes / gpus for name, bytes in weights.items()} | text_encoder,
            STEP: shared | job.step(learn),
            "while previews are drawn": shared | job.preview(),
        }
        flops = job.flops()
    if not roles.shared:  # a copy, before it is shared out
        copies = 4.0 * found.parameters * (1 + (len(learn) - 1) / gpus)
        found.moments["while roles are made"] = {"teacher": whole, "copies": copies}
    if recipe.method == "dmd":
        step = calls(recipe.student.steps, recipe.fake_updates if "fake" in learn else 0)
        found.forwards, found.backwards = step.forwards, step.backwards
        more = 2  # the teacher's one call has three times the batch
    else:
        found.forwards, found.backwards, more = recipe.student.steps, recipe.student.steps, 0
    again = found.backwards if recipe.gradient_checkpointing else 0
    found.flops = flops * (found.forwards + more + 2 * found.backwards + again) * recipe.train.accumulate
    return found


_LATER = {"init": None, "compile": False, "gradient_checkpointing": False}


class _Job:
    """The recipe's method with its roles on the meta device, each loss of which is run once under watch."""

    def __init__(
        self, recipe: DistillRecipe, roles: Roles, batch: int, kind: Literal["cuda", "cpu"], bf16: bool
    ) -> None:
        self.roles, self.recipe, self.batch, teacher = roles, recipe, batch, roles.teacher
        self.device, self.decoding = AsOn(kind, bf16), AsOn(kind, bf16=False)
        learning = [teacher.denoiser] if roles.shared else [roles.student.denoiser, roles.fake]
        for denoiser in learning:
            assert isinstance(denoiser, ZImageDenoiser)
            denoiser.run_block = self.device.around(denoiser.run_block)
            if recipe.gradient_checkpointing and roles.shared:
                denoiser.checkpoint_blocks(as_now)
            elif recipe.gradient_checkpointing:
                denoiser.checkpoint_blocks()
        self.latent = teacher.latent_shape(teacher.card.height, teacher.card.width)
        settings = settings_of(recipe, teacher.shift)
        self.sigmas = settings.sigmas
        # the rollout's steps hold no more than one of them
        short = replace(settings, anchors=settings.anchors[:2])
        self.method = DecoupledDmd(teacher.denoiser, roles.student.denoiser, roles.fake, self.prompts(1), short)

    def prompts(self, count: int) -> EncodedPrompts:
        wide = self.roles.teacher.transformer.config["cap_feat_dim"]
        features = torch.empty(count, PROMPT_TOKENS, wide, device="meta")
        return EncodedPrompts(features, torch.full((count,), PROMPT_TOKENS))

    def step(self, learn: Mapping[str, float]) -> dict[str, float]:
        """Beside weights and states: what is kept for the backward pass of the player that needs most, and what comes
        and goes meanwhile."""
        noise = torch.empty(self.batch, *self.latent, device="meta")
        states = noise[:, None].expand(-1, len(self.sigmas), -1, -1, -1)
        question = DistillBatch(noise, self.prompts(self.batch), states)
        losses: dict[str, list[Callable[[], Tensor]]] = {name: [] for name in learn}
        if self.recipe.method == "trajectory" or self.recipe.align:
            follow = lambda: torch.stack(astray(self.roles.student.denoiser, question, self.sigmas)).sum()  # noqa: E731
            losses["student"].append(follow)
        if self.recipe.method == "dmd":
            losses["student"].append(lambda: self.method.student_loss(question)[0])
        if "fake" in learn:
            losses["fake"].append(lambda: self.method.fake_loss(question)[0])
        modules = {"student": self.roles.student.denoiser, "fake": self.roles.fake}
        worst: dict[str, float] = {}
        for name, each in losses.items():
            for loss in each:
                found = self.watched(modules[name], loss)
                worst = max(worst, found, key=lambda parts: sum(parts.values()))
        return {name: bytes for name, bytes in worst.items() if bytes}

    def watched(self, module: nn.Module, loss: Callable[[], Tensor]) -> dict[str, float]:
        """One loss and its backward pass."""
        weights = [p for p in module.parameters() if p.requires_grad]
        for weight in weights:  # counted already: a second batch adds to those of the first
            weight.grad = torch.empty_like(weight)
        with Alive() as alive:
            with self.device.region():
                value = loss()
                kept, copies, most = alive.bytes, self.device.bytes, alive.most
            alive.mark()
            value.backward()
            most = max(most, alive.most)
        for weight in weights:
            weight.grad = None
        return {
            "bf16 copies": float(copies),
            "kept for the backward pass": float(kept - copies),
            "rollouts, scores, and what comes and goes": float(most - kept),
        }

    @torch.no_grad()
    def preview(self) -> dict[str, float]:
        """What drawing takes, and decoding."""
        card, vae = self.roles.teacher.card, self.roles.teacher.vae
        count = at_once(card.height, card.width)
        decoded = min(count, max(1, DECODED // (card.height * card.width)))
        most = []
        with Alive() as alive, self.device.region():
            x = torch.empty(count, *self.latent, device="meta")
            self.roles.student.denoiser(x, torch.empty(count, device="meta"), self.prompts(count))
            most.append(float(alive.most))
        with Alive() as alive, self.decoding.region():
            decode_latents(vae, torch.empty(decoded, *self.latent, device="meta"))
            most.append(float(alive.most))
        parts = [{"drawing": most[0]}, {"autoencoder": float(_bytes(vae)), "decoding": most[1]}]
        return max(parts, key=lambda one: sum(one.values()))

    @torch.no_grad()
    def flops(self) -> float:
        """Operations of one forward."""
        with FlopCounterMode(display=False) as counter, self.device.region():
            x = torch.empty(self.batch, *self.latent, device="meta")
            self.roles.teacher.denoiser(x, torch.empty(self.batch, device="meta"), self.prompts(self.batch))
        return float(counter.get_total_flops())


def _on_meta(recipe: DistillRecipe) -> TextToImage:
    """The recipe's teacher as a distillation loads it, without contents, and without what speaks of words."""
    folder = KNOWN.get(recipe.teacher) or find(recipe.teacher)
    with torch.device("meta"):
        transformer = ZImageTransformer2DModel.from_config(read_config(folder, "transformer"))
        vae = AutoencoderKL.from_config(read_config(folder, "vae"))
        text_encoder = Qwen3Model(Qwen3Config(**read_config(folder, "text_encoder")))
    for module in (transformer, vae, text_encoder):
        # not diffusers' own `to`, which warns of real weights
        nn.Module.to(module, torch.float32 if recipe.roles.base == "fp32" else torch.bfloat16)
        module.eval().requires_grad_(False)
    scheduler = load_part(folder, "scheduler")
    teacher = TextToImage(transformer, vae, text_encoder, None, scheduler, read_card(folder))
    teacher.at_size(recipe.size)
    return teacher


def _encoding(teacher: TextToImage) -> float:
    """Bytes of what the text encoder's layers say of the tokens that it is asked at once."""
    config = teacher.text_encoder.config
    return AT_ONCE * config.hidden_size * (config.num_hidden_layers + 1) * teacher.text_encoder.dtype.itemsize


@contextmanager
def _quietly_random() -> Iterator[None]:
    """Inside, draws leave the program's random numbers as they were."""
    with torch.random.fork_rng(devices=[]):
        yield


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


def _bytes(module: nn.Module) -> float:
    """Of parameters, and of what lies beside them, such as the scales of 8 bits."""
    return float(sum(t.nbytes for t in [*module.parameters(), *module.buffers()]))


def _moments(optim: OptimSettings) -> float:
    """Bytes of AdamW's two moments for a parameter; of 8 bits, with a scale for every 256."""
    return 8.0 if optim.bits == 32 else 2 * (1 + 4 / 256)
