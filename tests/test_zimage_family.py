"""Z-Image passes the tests of every family."""

import pytest
import torch
from diffusers import ZImagePipeline
from family_conformance import FamilyConformance


@pytest.fixture(scope="module")
def folder(tiny_folder):
    return tiny_folder


@pytest.fixture(scope="module")
def pipeline_class():
    return ZImagePipeline


class TestZImage(FamilyConformance):
    guidance_offset = 0.0

    def diffusers_velocity(self, pipeline, x, sigma, prompts):
        captions, _ = pipeline.encode_prompt(list(prompts), do_classifier_free_guidance=False)
        out = pipeline.transformer([sample[:, None] for sample in x], 1 - sigma, captions, return_dict=False)[0]
        return -torch.stack(out).squeeze(2)
