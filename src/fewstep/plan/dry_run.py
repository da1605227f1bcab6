"""A distillation's roles on torch's meta device, and its losses run there under watch: what a plan knows of memory."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from diffusers import AutoencoderKL, ZImageTransformer2DModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3Config, Qwen3Model

from fewstep.config.recipe import DistillRecipe
from fewstep.config.student_schedule import student_timesteps
from fewstep.core import flow
from fewstep.core.conditioning import EncodedPrompts
from fewstep.data.batch import DistillBatch
from fewstep.inference.batching import max_batch_size, max_decode_batch_size
from fewstep.jobs import dmd_config
from fewstep.methods.dmd.method import DecoupledDMD
from fewstep.methods.models_setup import Models, build_models
from fewstep.methods.trajectory import trajectory_mse
from fewstep.models.adapters import capture_adapter_state
from fewstep.models.components import load_component, read_config
from fewstep.models.generation_config import load_generation_config
from fewstep.models.pipeline import TextToImagePipeline
from fewstep.models.vae import decode_latents
from fewstep.models.zimage.denoiser import ZImageDenoiser
from fewstep.plan.memory_tracker import EmulatedDevice, MemoryTracker

PROMPT_TOKENS = 64  # a prompt of some 40 words, with the chat template


def meta_teacher(recipe: DistillRecipe, folder: Path) -> TextToImagePipeline:
    """The recipe's teacher as a distillation loads it from a folder, without contents, and without a tokenizer."""
    with torch.device("meta"):
        transformer = ZImageTransformer2DModel.from_config(read_config(folder, "transformer"))
        vae = AutoencoderKL.from_config(read_config(folder, "vae"))
        text_encoder = Qwen3Model(Qwen3Config(**read_config(folder, "text_encoder")))
    for module in (transformer, vae, text_encoder):
        # not diffusers' own `to`, which warns of real weights
        nn.Module.to(module, torch.float32 if recipe.roles.base == "fp32" else torch.bfloat16)
        module.eval().requires_grad_(False)
    scheduler = load_component(folder, "scheduler")
    teacher = TextToImagePipeline(transformer, vae, text_encoder, None, scheduler, load_generation_config(folder))
    teacher.set_resolution(recipe.size)
    return teacher


def meta_models(recipe: DistillRecipe, teacher: TextToImagePipeline) -> Models:
    """The roles as a distillation makes them; their blocks are compiled and checkpointed by nobody yet."""
    later = {"init": None, "compile": False, "gradient_checkpointing": False}
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return build_models(recipe.model_copy(update=later), teacher)


def bytes_of(module: nn.Module) -> float:
    """Of parameters, and of what lies beside them, such as the scales of 8 bits."""
    return float(sum(t.nbytes for t in [*module.parameters(), *module.buffers()]))


class DryRun:
    """The recipe's method with its roles on the meta device, each loss of which is run once under watch."""

    def __init__(
        self, recipe: DistillRecipe, roles: Models, batch: int, kind: Literal["cuda", "cpu"], bf16: bool
    ) -> None:
        self.roles, self.recipe, self.batch, teacher = roles, recipe, batch, roles.teacher
        self.device, self.decoding = EmulatedDevice(kind, bf16), EmulatedDevice(kind, bf16=False)
        learning = [teacher.denoiser] if roles.shared else [roles.student.denoiser, roles.fake]
        for denoiser in learning:
            assert isinstance(denoiser, ZImageDenoiser)
            denoiser.run_block = self.device.around(denoiser.run_block)
            if recipe.gradient_checkpointing and roles.shared:
                denoiser.enable_gradient_checkpointing(capture_adapter_state)
            elif recipe.gradient_checkpointing:
                denoiser.enable_gradient_checkpointing()
        self.latent = teacher.latent_shape(teacher.generation_config.height, teacher.generation_config.width)
        self.sigmas = flow.sigmas_from_timesteps(student_timesteps(recipe), teacher.shift)

    def method(self) -> DecoupledDMD:
        settings = dmd_config(self.recipe, self.roles.teacher.shift)
        # a rollout of many steps holds no more than one of one
        short = replace(settings, anchors=settings.anchors[:2])
        models = self.roles.teacher.denoiser, self.roles.student.denoiser, self.roles.fake
        return DecoupledDMD(*models, self.prompts(1), short)

    def prompts(self, count: int) -> EncodedPrompts:
        wide = self.roles.teacher.transformer.config["cap_feat_dim"]
        features = torch.empty(count, PROMPT_TOKENS, wide, device="meta")
        return EncodedPrompts(features, torch.full((count,), PROMPT_TOKENS))

    def step(self, learn: Collection[str]) -> dict[str, float]:
        """Memory beyond weights and states, for the trainable that needs most: saved activations and temporaries."""
        noise = torch.empty(self.batch, *self.latent, device="meta")
        states = noise[:, None].expand(-1, len(self.sigmas) - 1, -1, -1, -1)
        question = DistillBatch(noise, self.prompts(self.batch), states)
        losses: dict[str, list[Callable[[], Tensor]]] = {name: [] for name in learn}
        if self.recipe.method == "trajectory" or self.recipe.align:
            follow = lambda: torch.stack(trajectory_mse(self.roles.student.denoiser, question, self.sigmas)).sum()  # noqa: E731
            losses["student"].append(follow)
        if self.recipe.method == "dmd":
            method = self.method()
            losses["student"].append(lambda: method.student_loss(question)[0])
            if "fake" in learn:
                losses["fake"].append(lambda: method.fake_loss(question)[0])
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
        with MemoryTracker() as alive:
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
        card, vae = self.roles.teacher.generation_config, self.roles.teacher.vae
        count = max_batch_size(card.height, card.width)
        decoded = min(count, max_decode_batch_size(card.height, card.width))
        most = []
        with MemoryTracker() as alive, self.device.region():
            x = torch.empty(count, *self.latent, device="meta")
            self.roles.student.denoiser(x, torch.empty(count, device="meta"), self.prompts(count))
            most.append(float(alive.most))
        with MemoryTracker() as alive, self.decoding.region():
            decode_latents(vae, torch.empty(decoded, *self.latent, device="meta"))
            most.append(float(alive.most))
        parts = [{"drawing": most[0]}, {"autoencoder": float(bytes_of(vae)), "decoding": most[1]}]
        return max(parts, key=lambda one: sum(one.values()))

    @torch.no_grad()
    def flops(self) -> float:
        """Operations of one forward."""
        with FlopCounterMode(display=False) as counter, self.device.region():
            x = torch.empty(self.batch, *self.latent, device="meta")
            self.roles.teacher.denoiser(x, torch.empty(self.batch, device="meta"), self.prompts(self.batch))
        return float(counter.get_total_flops())
