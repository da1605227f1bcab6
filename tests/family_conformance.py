"""What every model family must do, as tests: ``class TestMine(FamilyConformance)`` runs them on a tiny model.

The reference is diffusers alone: its pipeline opens what fewstep writes and gives the same images.
"""

from __future__ import annotations

import copy
import json
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fewstep import api
from fewstep.errors import UserError
from fewstep.export.diffusers import to_diffusers
from fewstep.inference.generate import generate
from fewstep.inference.params import SamplingParams
from fewstep.models.adapter_files import adapter_state_dict
from fewstep.models.adapters import AdapterDenoiser, adapter_parameters, add_adapter
from fewstep.models.family import resolve_family
from fewstep.models.generation_config import GenerationConfig
from fewstep.models.meta_pipeline import meta_pipeline
from fewstep.models.noise import initial_noise
from fewstep.models.offload import offload_blocks
from fewstep.models.partial_models import load_prompt_encoder
from fewstep.models.pipeline import TextToImagePipeline, load
from fewstep.models.quantize import FP8, Fp8Linear

PROMPTS = ["a fox", "a red apple on blue", ""]
CLOSE = {"atol": 1e-5, "rtol": 1e-4}

DISTILL = [
    *("train.batch_size=2", "train.log_every=1", "train.save_every=5", "train.sample_every=0", "train.precision=fp32"),
    *("method.terms={cfg_augmentation: {}, distribution_matching: {}}", "method.fake_score_start=0", "train.steps=1"),
    *("optim={student: {lr: 0.01}, fake_score: {lr: 0.01}}", "evaluate={enabled: false}", "student.steps=2"),
]


class FamilyConformance(ABC):
    """The tests of a family. A subclass has two fixtures and two methods.

    Fixtures:
        folder: a tiny model as diffusers writes it, with random weights in all layers and at least two blocks; of scope
            "class" or wider.
        pipeline_class: diffusers' pipeline.
    """

    #: Arguments of diffusers' pipeline without which it computes something else than plain guidance.
    call_options: dict[str, Any] = {}  # noqa: RUF012
    #: Whether diffusers samples a student with as many steps at its levels; if not, they are given as ``sigmas``.
    evenly_spaced = True
    #: diffusers' ``guidance_scale`` minus that of fewstep, which is g in cond + g (cond - null).
    guidance_offset = 1.0
    #: Of the latents that the tests compute with: 1 is an image.
    frames = 1

    @abstractmethod
    def diffusers_velocity(
        self, pipeline: Any, x: torch.Tensor, sigma: torch.Tensor, prompts: list[str]
    ) -> torch.Tensor:
        """The velocity eps - x0 by diffusers' pipeline and transformer, for nonempty prompts."""

    def diffusers_images(self, pipeline: Any, **options: Any) -> torch.Tensor:
        """What diffusers' pipeline makes, [B, ..., 3, H, W] in [0, 1]."""
        return pipeline(output_type="pt", **options).images

    @pytest.fixture(scope="class")
    def model(self, folder: Path) -> TextToImagePipeline:
        return load_tiny(folder)

    @pytest.fixture(scope="class")
    def reference(self, folder: Path, pipeline_class: Any) -> Any:
        return pipeline_class.from_pretrained(folder)

    def assert_same_images(
        self, ours: TextToImagePipeline, theirs: Any, steps: int = 3, scale: float = 0.0, **options: Any
    ) -> None:
        """Of ``PROMPTS[:2]`` from the same noise, up to rounding."""
        settings = SamplingParams(seed=5, steps=steps, guidance_scale=scale, height=64, width=64, frames=self.frames)
        images = generate(ours, PROMPTS[:2], settings).images.float()
        expected = self.diffusers_images(
            quiet(theirs), prompt=PROMPTS[:2], height=64, width=64, num_inference_steps=steps,
            latents=initial_noise(ours, [5, 6], 64, 64, self.frames), guidance_scale=scale + self.guidance_offset,
            **self.call_options, **options,
        )  # fmt: skip
        assert images.std() > 1
        assert (images - (expected.movedim(-3, -1) * 255).round()).abs().max() <= 2

    def test_weights_are_those_of_diffusers(self, model, reference, folder):
        assert resolve_family(folder) is model.family
        for name in model.family.modules:
            ours, theirs = model.components[name].state_dict(), reference.components[name].state_dict()
            torch.testing.assert_close(ours, theirs, atol=0, rtol=0)

    def test_the_velocity_is_that_of_diffusers(self, model, reference):
        """Prompts of different lengths, and images that are not square."""
        x, sigma, _ = inputs(model, self.frames)
        ours = model.denoiser(x[:2], sigma[:2], model.encode(PROMPTS[:2]))
        theirs = self.diffusers_velocity(reference, x[:2], sigma[:2], PROMPTS[:2])
        assert theirs.abs().mean() > 0.01
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, **CLOSE)

    @pytest.mark.parametrize("scale", [0.0, 2.0])
    def test_images_are_those_of_diffusers(self, model, reference, scale):
        self.assert_same_images(model, reference, scale=scale)

    def test_prompts_are_encoded_once_and_alone_as_in_a_batch(self, model, folder):
        encoded = model.encode(PROMPTS)
        assert encoded.features.shape[2] == model.family.prompt_features(model.components)
        assert encoded.features.dtype == torch.float32
        alone = load_prompt_encoder(folder, "cpu")
        for row, prompt in enumerate(PROMPTS):
            single = alone([prompt])
            length = int(encoded.lengths[row])
            assert single.lengths.item() == length
            torch.testing.assert_close(single.features[0], encoded.features[row, :length], **CLOSE)
            assert (encoded.features[row, length:] == 0).all()
        last = encoded.features[range(3), encoded.lengths - 1]
        assert not torch.equal(last[0], last[1])
        assert not torch.equal(last[0], last[2])

    def test_a_batch_is_its_samples(self, model):
        x, sigma, prompts = inputs(model, self.frames)
        together = model.denoiser(x, sigma, prompts)
        for row in range(len(x)):
            one = slice(row, row + 1)
            torch.testing.assert_close(model.denoiser(x[one], sigma[one], prompts[one]), together[one], **CLOSE)

    def test_every_input_matters(self, model):
        x, sigma, prompts = inputs(model, self.frames)
        before = model.denoiser(x, sigma, prompts)
        for other in ((x + 1, sigma, prompts), (x, sigma / 2, prompts), (x, sigma, prompts[[1, 2, 0]])):
            assert (model.denoiser(*other) - before).abs().amax(dim=(1, 2, 3)).min() > 1e-4

    def test_cached_text_changes_nothing(self, model):
        x, sigma, prompts = inputs(model, self.frames)
        expected = [model.denoiser(x, level, prompts) for level in (sigma, sigma / 2)]
        with model.denoiser.cache_text_tokens():
            for level, velocity in zip((sigma, sigma / 2), expected, strict=True):
                assert torch.equal(model.denoiser(x, level, prompts), velocity)

    def test_features_are_of_image_tokens(self, model):
        x, sigma, prompts = inputs(model, self.frames)
        features = model.denoiser.features(x, sigma, prompts)
        tokens = x[0, 0].numel() // model.family.patch_size**2
        assert features.shape == (3, tokens, model.denoiser.feature_dim)
        twice = model.denoiser.features(x, sigma, prompts, depths=(0.5, 1.0))
        assert twice.shape == (3, tokens, 2 * model.denoiser.feature_dim)
        assert torch.equal(twice[..., : model.denoiser.feature_dim], features)
        assert (model.denoiser.features(x + 1, sigma, prompts) - features).abs().amax(dim=(1, 2)).min() > 1e-4

    def test_sides_are_multiples(self, model):
        multiple = model.latent_multiple
        shape = model.latent_shape(64, 64 + multiple)
        assert model.latent_shape(64, 64)[:-1] == shape[:-1]
        with pytest.raises(UserError, match=f"is not a multiple of {multiple}"):
            model.latent_shape(64, 64 + multiple // 2)
        images = torch.rand(1, 3, 64, 64 + multiple)
        assert model.encode_images(images).shape[1:] == shape
        assert model.decode(torch.randn(1, *shape)).shape == images.shape

    def test_blocks_are_checkpointed_and_offloaded(self, folder):
        gradients = []
        for change in (
            lambda _: None, lambda d: d.enable_gradient_checkpointing(), lambda d: offload_blocks(d, "cpu")
        ):  # fmt: skip
            model = load_tiny(folder)
            assert len(model.denoiser.get_blocks()) > 1
            model.transformer.requires_grad_(True)
            change(model.denoiser)
            with torch.enable_grad():
                model.denoiser(*inputs(model, self.frames)).square().mean().backward()
            gradients.append({name: p.grad for name, p in model.transformer.named_parameters() if p.grad is not None})
        assert len(gradients[0]) > 0.9 * len(list(model.transformer.parameters()))
        torch.testing.assert_close(gradients[1], gradients[0])
        torch.testing.assert_close(gradients[2], gradients[0])

    def test_adapters_open_in_diffusers(self, folder, pipeline_class, tmp_path):
        model = load_tiny(folder)
        expected = model.denoiser(*inputs(model, self.frames))
        add_adapter(model.transformer, "student", 2, 4.0, target_modules=model.family.lora_target_modules)
        parameters = adapter_parameters(model.transformer, "student")
        assert set(adapted_blocks(model)) == {id(block) for block in model.denoiser.get_blocks()}
        torch.manual_seed(2)
        for parameter in parameters.values():
            nn.init.normal_(parameter, std=0.2)
        student = AdapterDenoiser(model.denoiser, {"student": 1.0})
        assert (student(*inputs(model, self.frames)) - expected).abs().max() > 1e-3
        torch.testing.assert_close(model.denoiser(*inputs(model, self.frames)), expected)
        model.family.write_lora(tmp_path / "lora", adapter_state_dict(model.transformer, "student"))
        merged = load_tiny(folder, loras={str(tmp_path / "lora"): 1.0})
        torch.testing.assert_close(
            merged.denoiser(*inputs(model, self.frames)), student(*inputs(model, self.frames)), **CLOSE
        )
        theirs = pipeline_class.from_pretrained(folder)
        theirs.load_lora_weights(tmp_path / "lora")
        self.assert_same_images(merged, theirs, steps=2)

    def test_the_layers_for_fp8_are_in_blocks(self, folder):
        model = load_tiny(folder, dtype=FP8)
        blocks = {id(module) for block in model.denoiser.get_blocks() for module in block.modules()}
        quantized = [module for module in model.transformer.modules() if isinstance(module, Fp8Linear)]
        assert len(quantized) >= 4 * len(model.denoiser.get_blocks())
        assert {id(module) for module in quantized} <= blocks

    def test_a_plain_transformer_shares_the_weights(self, model):
        plain = to_diffusers(model.transformer, model.family)
        assert type(plain) is type(model.transformer)
        assert model.family.denoiser(copy.deepcopy(plain)) is not None
        x, sigma, prompts = inputs(model, self.frames)
        again = model.family.denoiser(plain)
        assert torch.equal(again(x, sigma, prompts), model.denoiser(x, sigma, prompts))

    def test_shapes_are_known_without_weights(self, model, folder):
        with without_expected_warnings():
            meta = meta_pipeline(folder, torch.bfloat16)
        shapes = {name: tensor.shape for name, tensor in model.transformer.state_dict().items()}
        assert {name: tensor.shape for name, tensor in meta.transformer.state_dict().items()} == shapes
        x, sigma, prompts = inputs(model, self.frames)
        assert meta.denoiser(x.to("meta"), sigma.to("meta"), prompts.to("meta")).shape == x.shape

    @pytest.mark.parametrize("train", [pytest.param("full", marks=pytest.mark.slow), "lora"])
    def test_a_distilled_student_opens_in_diffusers(self, model, pipeline_class, tmp_path, train):
        config = GenerationConfig(steps=2, guidance_scale=1.0, height=64, width=64, frames=self.frames)
        teacher = model.with_transformer(model.transformer, config).save(tmp_path / "teacher")
        (tmp_path / "prompts.txt").write_text("".join(f"{n} foxes\n" for n in range(20)))
        more = [f"teacher={teacher}", f"prompts.source={tmp_path / 'prompts.txt'}", f"models.train={train}"]
        made = api.distill("micro-aligned", tmp_path / "run", overrides=[*DISTILL, *more])
        student = load_tiny(made.student)
        assert student.generation_config.size == (64, 64, self.frames)
        before = model.transformer.state_dict()
        assert not all(torch.equal(tensor, before[name]) for name, tensor in student.transformer.state_dict().items())
        index = json.loads((made.student / "model_index.json").read_text())
        assert index["_class_name"] == pipeline_class.__name__
        levels = {} if self.evenly_spaced else {"sigmas": [1.0, 0.5]}
        self.assert_same_images(student, pipeline_class.from_pretrained(made.student), steps=2, **levels)


@contextmanager
def without_expected_warnings() -> Iterator[None]:
    """Inside, no warning of a folder without ``fewstep.json``, whose defaults the tests do not use, or of slow fp8."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*no fewstep.json|weights in fp8")
        yield


def load_tiny(folder: Path, **options: Any) -> TextToImagePipeline:
    with without_expected_warnings():
        return load(folder, "cpu", **options)


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def inputs(model: TextToImagePipeline, frames: int = 1) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Three noisy latents of 64 x 96 px, their sigmas, and prompts of different lengths with the null prompt."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, *model.latent_shape(64, 96, frames), generator=generator)
    return x, 0.2 + 0.8 * torch.rand(3, generator=generator), model.encode(PROMPTS)


def adapted_blocks(model: TextToImagePipeline) -> list[int]:
    """The identities of the blocks with adapters."""
    return [
        id(block)
        for block in model.denoiser.get_blocks()
        if any(".lora_" in name for name, _ in block.named_parameters())
    ]
