"""Lumina 2 passes the tests of every family; its template, null prompt and configuration."""

import pytest
import torch
from diffusers import Lumina2Pipeline
from family_conformance import FamilyConformance, load_tiny
from lumina2_setup import save_lumina2

from fewstep.errors import UserError
from fewstep.models.lumina2.prompts import SYSTEM_PROMPT


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_lumina2(tmp_path_factory.mktemp("models") / "lumina2")


@pytest.fixture(scope="module")
def pipeline_class():
    return Lumina2Pipeline


class TestLumina2(FamilyConformance):
    call_options = {"cfg_normalization": False}  # noqa: RUF012

    def diffusers_velocity(self, pipeline, x, sigma, prompts):
        features, mask, _, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
        return -pipeline.transformer(x, 1 - sigma, features, mask, return_dict=False)[0]


def test_the_template_has_a_system_prompt_and_the_null_prompt_has_none(folder):
    encoder = load_tiny(folder).encoder
    assert Lumina2Pipeline.from_pretrained(folder).system_prompt == SYSTEM_PROMPT
    assert encoder.template("a fox") == encoder.template("a fox", system="") == f"{SYSTEM_PROMPT} <Prompt Start> a fox"
    assert encoder.template("a fox", system="Draw.") == "Draw. <Prompt Start> a fox"
    assert encoder([""]).lengths.tolist() == [1]  # <bos>
    with pytest.raises(UserError, match="have no such part"):
        encoder(["a fox"], assistant_prefix="It is red.")
    with pytest.raises(UserError, match="at most 256 fit"):
        encoder(["a" * 256])


def test_attention_backends_are_refused(folder):
    with pytest.raises(UserError, match="Lumina2Pipeline has PyTorch's alone"):
        load_tiny(folder).set_attention_backend("native")


def test_the_default_is_that_of_the_released_model(folder):
    config = load_tiny(folder).generation_config
    assert (config.steps, config.guidance_scale) == (50, 3.0)


def test_another_patch_size_is_refused(folder):
    transformer = load_tiny(folder).transformer
    transformer.register_to_config(patch_size=4)
    with torch.no_grad():
        found = list(load_tiny(folder).family.mismatches({**load_tiny(folder).components, "transformer": transformer}))
    assert found == [("transformer", "patch_size 4 is not supported; only 2 is")]
