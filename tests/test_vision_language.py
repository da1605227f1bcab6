"""Images in prompts: Qwen3-VL with the text encoder's weights, and self-distillation that sees the image through it."""

from __future__ import annotations

import copy

import pytest
import torch
from lora_training import CPU, few_step, image_set, run_lora
from safetensors.torch import load_file
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from fewstep.config.load import load_recipe
from fewstep.core.conditioning import EncodedPrompts
from fewstep.core.registry import lora_methods
from fewstep.data.batch import DistillBatch
from fewstep.errors import UserError
from fewstep.methods.lora.base import LoraSetup
from fewstep.methods.lora.models_setup import build_lora_models
from fewstep.methods.lora.self_distillation import privileged_x0
from fewstep.models import vision_language
from fewstep.models.pipeline import load
from fewstep.models.vision_language import open_vision_language_encoder
from fewstep.plan.estimate import STEP
from fewstep.plan.lora import plan_lora

__all__ = ["few_step", "image_set"]  # fixtures

TEXT = "a fox on a blue background"


def save_qwen3_vl(text_encoder, folder, **text):
    """A random Qwen3-VL whose language part has the text encoder's sizes; its vision part has 2 layers."""
    own, vocabulary = text_encoder.config, text_encoder.config.vocab_size
    sizes = {name: getattr(own, name) for name in (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "rms_norm_eps",
    )}  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": own.rope_parameters["rope_theta"], "mrope_section": [4, 2, 2]}
    vision = {
        "depth": 2, "hidden_size": 16, "num_heads": 2, "intermediate_size": 24, "out_hidden_size": own.hidden_size,
        "num_position_embeddings": 16, "deepstack_visual_indexes": [0], "initializer_range": 0.3,
    }  # fmt: skip
    torch.manual_seed(3)
    config = Qwen3VLConfig(
        text_config={**sizes, "rope_parameters": rope, **text}, vision_config=vision,
        vision_start_token_id=vocabulary - 3, image_token_id=vocabulary - 2, vision_end_token_id=vocabulary - 1,
    )  # fmt: skip
    Qwen3VLForConditionalGeneration(config).save_pretrained(folder)
    Qwen2VLImageProcessorPil(patch_size=16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def qwen3_vl(tiny, tmp_path_factory):
    return save_qwen3_vl(tiny.text_encoder, tmp_path_factory.mktemp("qwen3-vl"))


def test_an_image_is_encoded_before_its_caption_by_the_text_encoder_s_own_layers(tiny, qwen3_vl):
    encoder = open_vision_language_encoder(qwen3_vl, tiny.encoder)
    image = torch.rand(3, 64, 96)
    features, caption = encoder(image, TEXT), tiny.encoder.features([TEXT])[0]
    # 512 x 512 pixels at least, at the aspect ratio of 2:3, in squares of 32: 14 x 20 tokens, and two around them
    assert features.shape == (len(caption) + 14 * 20 + 2, 32)
    start = len(tiny.encoder.tokenizer(tiny.encoder.template(TEXT).split(TEXT)[0]).input_ids)
    torch.testing.assert_close(features[:start], caption[:start], atol=1e-5, rtol=1e-4)  # nothing before the image
    assert (features[-3:] - caption[-3:]).abs().max() > 1e-2  # what comes after it knows it
    other = encoder(image.flip(1), TEXT)
    assert torch.equal(other[:start], features[:start])
    assert (other[-1] - features[-1]).abs().max() > 1e-3
    assert torch.equal(encoder(image, TEXT), features)


def test_the_weights_are_shared_with_the_text_encoder(tiny, qwen3_vl):
    model = open_vision_language_encoder(qwen3_vl, tiny.encoder).model
    theirs = model.language_model.embed_tokens.weight
    assert theirs.data_ptr() == tiny.text_encoder.embed_tokens.weight.data_ptr()


def test_long_features_are_cut_off(tiny, qwen3_vl, monkeypatch):
    monkeypatch.setattr(vision_language, "MAX_TOKENS", 100)
    encoder = open_vision_language_encoder(qwen3_vl, tiny.encoder)
    assert len(encoder(torch.rand(3, 32, 32), TEXT)) == 100


def test_another_model_is_refused(tiny, tmp_path):
    smaller = save_qwen3_vl(tiny.text_encoder, tmp_path / "smaller", num_hidden_layers=2)
    with pytest.raises(UserError, match="smaller: its language part has other layers than the model's text encoder"):
        open_vision_language_encoder(smaller, tiny.encoder)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="no Qwen3-VL can be loaded"):
        open_vision_language_encoder(tmp_path, tiny.encoder)
    other = copy.copy(tiny.encoder)
    other.text_encoder = torch.nn.Linear(1, 1)
    other.text_encoder.config = None
    with pytest.raises(UserError, match="Qwen3 text encoder alone"):
        open_vision_language_encoder(tmp_path, other)


def test_self_distillation_sees_the_image_and_resumes_exactly(few_step, image_set, qwen3_vl, tmp_path):
    plain = [f"model={few_step}", f"data.images={image_set}", f"data.cache={tmp_path / 'cache'}"]
    more = [*plain, f"method={{name: self_distillation, vision_language_model: {qwen3_vl}}}"]
    whole = run_lora(tmp_path / "whole", *more, "train.steps=3")
    assert len(list((tmp_path / "cache").glob("privileged-*.safetensors"))) == 1
    run_lora(tmp_path / "parts", *more, "train.steps=2")
    parts = load_file(run_lora(tmp_path / "parts", *more, "train.steps=3"))
    tensors = load_file(whole)
    assert all(torch.equal(tensor, parts[name]) for name, tensor in tensors.items())
    blind = load_file(run_lora(tmp_path / "blind", *plain, "method.name=self_distillation", "train.steps=3"))
    assert any(not torch.equal(tensor, blind[name]) for name, tensor in tensors.items())


def test_the_target_is_the_copy_s_prediction_with_the_privileged_prompts(few_step, qwen3_vl):
    chosen = f"method={{name: self_distillation, vision_language_model: {qwen3_vl}}}"
    recipe = load_recipe("micro-lora", ["data.images=set", "data.preservation=null", "models.compile=false", chosen])
    torch.manual_seed(0)
    models = build_lora_models(recipe, load(few_step, CPU, torch.float32), CPU)
    encoded = models.model.encode(["a", "b"])
    method = lora_methods.get("self_distillation").build(LoraSetup(recipe, models, models.model.encode([""])))
    noise = torch.randn(2, *models.model.latent_shape(64, 64))
    seen = EncodedPrompts.pad(list(torch.randn(2, 40, 32)))
    blind = DistillBatch(noise, encoded, torch.zeros_like(noise)[:, None], ["a", "b"])
    batch = DistillBatch(noise, encoded, torch.zeros_like(noise)[:, None], ["a", "b"], seen)
    sigma = torch.full((2,), 0.9)
    target = privileged_x0(method.copy, noise, sigma, batch, method.weight)
    assert method.weight == 0
    expected = noise - 0.9 * method.copy(noise, sigma, seen).float()
    torch.testing.assert_close(target, expected, atol=1e-5, rtol=1e-4)
    assert (target - privileged_x0(method.copy, noise, sigma, blind, 0)).abs().max() > 1e-3


def test_the_plan_counts_the_longer_prompts(few_step, qwen3_vl):
    words = [f"model={few_step}", "data.preservation=null", "train.batch_size=2"]
    blind = plan_lora(load_recipe("micro-lora", [*words, "method={name: self_distillation}"]))
    chosen = f"method={{name: self_distillation, vision_language_model: {qwen3_vl}}}"
    seeing = plan_lora(load_recipe("micro-lora", [*words, chosen]))
    assert sum(seeing.peaks[STEP].values()) > 1.1 * sum(blind.peaks[STEP].values())
