"""Distillations with LoRA: exact resume, files that diffusers opens, mistakes, a bf16 base."""

import json

import pytest
import torch
from diffusers import ZImagePipeline
from safetensors.torch import load_file

from fewstep import api
from fewstep.config.load import load_recipe
from fewstep.errors import UserError
from fewstep.inference.generate import generate
from fewstep.inference.params import SamplingParams
from fewstep.methods.models_setup import build_models
from fewstep.models.adapters import adapter_parameters
from fewstep.models.pipeline import load

SHORT = [
    *("train.batch_size=2", "train.log_every=1", "train.save_every=2", "train.sample_every=0", "train.precision=fp32"),
    *("method.terms={cfg_augmentation: {}, distribution_matching: {}}", "method.fake_score_start=0"),
    *("method.fake_score_updates=2", "evaluate.enabled=false", "evaluate.validate_every=0", "student.steps=2"),
    *("optim.student.lr_schedule=constant", "optim.student.min_lr_ratio=0", "models.train=lora"),
]


@pytest.mark.slow
def test_a_run_resumes_exactly_and_its_files_open_in_diffusers(tiny, tiny_folder, tmp_path):
    more = [f"teacher={tiny_folder}", *SHORT, "models.rank=4", "models.fake_score_rank=2", "models.lora_alpha=8"]
    more += ["models.gradient_checkpointing=true"]
    more += ["optim.student={lr: 0.05, ema_decay: 0.5}", "optim.fake_score={lr: 0.01}"]
    made = api.distill("micro-aligned", tmp_path / "whole", overrides=[*more, "train.steps=3"])
    api.distill("micro-aligned", tmp_path / "parts", overrides=[*more, "train.steps=2"])
    api.distill("micro-aligned", tmp_path / "parts", overrides=[*more, "train.steps=3"])
    files = [sorted((tmp_path / run).glob("**/*.safetensors")) for run in ("whole", "parts")]
    files = [[f for f in each if "checkpoints" not in f.parts] for each in files]
    assert len(files[0]) == 4
    for one, other in zip(*files, strict=True):
        tensors, others = load_file(one), load_file(other)
        assert tensors.keys() == others.keys()
        assert all(torch.equal(tensor, others[name]) for name, tensor in tensors.items()), one
    first, second = (
        json.loads((tmp_path / run / "metrics.jsonl").read_text().splitlines()[-1]) for run in ("whole", "parts")
    )
    assert first["student/loss"] == second["student/loss"]

    # the adapter alone, merged into the teacher by --lora, is the student
    merged = load(tiny_folder, loras={str(tmp_path / "whole" / "lora"): 1.0}).transformer.state_dict()
    torch.testing.assert_close(merged, load(made.student).transformer.state_dict(), atol=1e-5, rtol=1e-4)

    # the adapter alone, loaded by diffusers onto the teacher, gives the images of the merged student
    student = load(made.student)
    ours = generate(student, ["a dog"], SamplingParams(seed=5)).images[0]
    assert (
        ours.int() - generate(tiny, ["a dog"], SamplingParams(seed=5, steps=2, guidance_scale=0)).images[0].int()
    ).abs().max() > 2
    pipeline = ZImagePipeline.from_pretrained(tiny_folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(tmp_path / "whole" / "lora", adapter_name="turbo")
    image = pipeline(
        "a dog", height=64, width=64, num_inference_steps=2, guidance_scale=0.0,
        generator=torch.Generator("cpu").manual_seed(5), output_type="pt",
    ).images[0]  # fmt: skip
    theirs = (image.permute(1, 2, 0) * 255).round()
    assert (ours.float() - theirs).abs().max() <= 2


def test_invalid_adapter_settings_are_refused(tiny_folder):
    def build(*overrides):
        recipe = load_recipe("micro-aligned", [f"teacher={tiny_folder}", "models.train=lora", *overrides])
        return build_models(recipe, load(tiny_folder), ["fake_score"])

    with pytest.raises(UserError, match="adapters of one rank"):
        build("method.fake_score_ema_to_student=0.1", "models.fake_score_rank=1")
    with pytest.raises(UserError, match=r"^target_modules: no linear layer is named .to_x.; there are .*to_q, "):
        build("models.target_modules=[to_x]")


def test_an_adapter_starts_from_that_of_an_earlier_run(tiny_folder, tmp_path):
    more = ["models.rank=2", "models.lora_alpha=1", "train.steps=1", "optim.student={lr: 0.01}"]
    overrides = [f"teacher={tiny_folder}", *SHORT, *more]
    first = api.distill("micro-aligned", tmp_path / "first", overrides=overrides).student
    recipe = load_recipe("micro-aligned", [*overrides, f"init={first}"])
    models = build_models(recipe, load(tiny_folder))
    adapter = adapter_parameters(models.teacher.transformer, "student")
    assert max(p.abs().max() for name, p in adapter.items() if "lora_B" in name) > 1e-4
    prompts, x, sigma = models.teacher.encode(["a fox"]), torch.randn(1, 16, 8, 8), torch.ones(1)
    with torch.no_grad():
        expected = load(first).denoiser(x, sigma, prompts)
        torch.testing.assert_close(models.student.denoiser(x, sigma, prompts), expected, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(models.teacher.denoiser(x, sigma, prompts), expected, atol=1e-4)
    with pytest.raises(UserError, match="another rank"):
        build_models(load_recipe("micro-aligned", [*overrides, f"init={first}", "models.rank=3"]), load(tiny_folder))
    with pytest.raises(UserError, match="a student starts from the adapter of an earlier LoRA run"):
        build_models(load_recipe("micro-aligned", [*overrides, f"init={tiny_folder}"]), load(tiny_folder))


@pytest.mark.slow
def test_bf16_base_with_fp32_adapters(tiny_folder, tmp_path):
    """The base takes half the memory, adapters are trained in fp32; the student is the base plus its adapter."""
    more = ("models.frozen_dtype=bf16", "models.rank=4", "train.steps=2", "train.precision=bf16")
    out = tmp_path / "run"
    overrides = [f"teacher={tiny_folder}", *SHORT, *more, "optim.student={lr: 0.01}"]
    recipe = load_recipe("micro-aligned", overrides)
    teacher = load(tiny_folder, dtype=torch.bfloat16)
    models = build_models(recipe, teacher)
    dtypes = {(".lora_" in name, p.dtype) for name, p in teacher.transformer.named_parameters()}
    assert dtypes == {(False, torch.bfloat16), (True, torch.float32)}
    assert {p.dtype for p in models.student.denoiser.parameters()} == {torch.float32}

    api.distill("micro-aligned", out, overrides=overrides)
    lora = load_file(out / "lora" / "pytorch_lora_weights.safetensors")
    assert {tensor.dtype for tensor in lora.values()} == {torch.float32}
    assert any(tensor.abs().max() > 0 for name, tensor in lora.items() if "lora_B" in name)
    merged_student, base = load(out / "student", dtype=torch.float32), load(tiny_folder)
    name = "layers.0.attention.to_q"
    added = lora[f"transformer.{name}.lora_B.weight"] @ lora[f"transformer.{name}.lora_A.weight"]
    expected = base.transformer.get_submodule(name).weight.bfloat16().float() + added
    torch.testing.assert_close(merged_student.transformer.get_submodule(name).weight, expected, atol=1e-2, rtol=1e-2)
