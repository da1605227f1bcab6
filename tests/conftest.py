"""Seeds every test, and builds a model small enough for tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from fewstep.emoji.recipes import TextEncoderSettings, TransformerSettings
from fewstep.emoji.train_flow_matching import build_transformer
from fewstep.emoji.train_text_encoder import build_text_encoder
from fewstep.emoji.train_vae import build_vae
from fewstep.models.components import BUNDLED_MODELS
from fewstep.models.family import get_family
from fewstep.models.generation_config import GenerationConfig
from fewstep.models.pipeline import TextToImagePipeline

torch.set_num_threads(1)  # tests run in parallel
pytest.register_assert_rewrite("family_conformance")


@pytest.fixture(autouse=True)
def seed_torch() -> None:
    """A test's random numbers do not depend on the tests before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_gpu_unless_marked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """ "auto" is the CPU in all tests but those marked gpu: they compare with tensors there."""
    if "gpu" not in request.keywords:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="session")
def tiny() -> TextToImagePipeline:
    """All components of Z-Image with random weights, 64 px; the tokenizer is the bundled model's."""
    from transformers import Qwen2Tokenizer

    torch.manual_seed(0)
    tokenizer = Qwen2Tokenizer.from_pretrained(BUNDLED_MODELS["micro"] / "tokenizer")
    text = TextEncoderSettings(
        vocab_size=len(tokenizer), hidden_size=32, layers=3, heads=2, head_dim=16, intermediate_size=48
    )
    transformer = build_transformer(
        TransformerSettings(dim=48, n_layers=2, n_refiner_layers=1, n_heads=2, axes_dims=(8, 8, 8)), 32, 16
    )
    for parameter in transformer.parameters():  # its output layer is initialized to 0, which would hide differences
        torch.nn.init.normal_(parameter, std=0.1)
    vae = build_vae([8, 8, 16, 16], 1, 16, 4)
    encoder = build_text_encoder(text, tokenizer)
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0)
    config = GenerationConfig(steps=6, guidance_scale=2.0, height=64, width=64)
    for module in (transformer, vae, encoder):
        module.eval().requires_grad_(False)
    components = {
        "transformer": transformer, "vae": vae, "text_encoder": encoder, "tokenizer": tokenizer, "scheduler": scheduler,
    }  # fmt: skip
    return TextToImagePipeline(get_family("ZImagePipeline"), components, config)


@pytest.fixture(scope="session")
def tiny_folder(tiny: TextToImagePipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("models") / "tiny")
