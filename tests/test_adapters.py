"""LoRA roles on one base: they are what full copies would be, and what comes out opens elsewhere."""

import copy
import json

import pytest
import torch
from diffusers import ZImagePipeline
from safetensors.torch import load_file

from fewstep import api
from fewstep.config.load import load_recipe
from fewstep.data.trajectories import weights_hash
from fewstep.errors import UserError
from fewstep.inference.generate import generate
from fewstep.inference.params import SamplingParams
from fewstep.methods.models_setup import build_models
from fewstep.models.adapters import (
    TARGETS,
    AdapterDenoiser,
    adapter_parameters,
    add_adapter,
    capture_adapter_state,
    write_merged,
)
from fewstep.models.components import load_component
from fewstep.models.pipeline import load
from fewstep.models.quantize import quantize_fp8_
from fewstep.models.zimage.denoiser import ZImageDenoiser

SHORT = [
    *("train.batch_size=2", "train.log_every=1", "train.save_every=2", "train.sample_every=0"),
    *("train.precision=fp32", "fake_updates=2", "evaluate.enabled=false", "student.steps=2"),
    "shield.regression=0",
    "align=0",
    "fake_warmup=0",
    "optim.student.lr_schedule=constant",
]


@pytest.fixture
def transformer(tiny):
    return copy.deepcopy(tiny.transformer)


def question(tiny, seed=0):
    torch.manual_seed(seed)
    prompts = tiny.encode(["a dog", "a cat on a mat"])
    return torch.randn(2, 16, 8, 8), torch.rand(2), prompts


def targeted(model):
    return {n: m for n, m in model.named_modules() if n.endswith(TARGETS) and isinstance(m, torch.nn.Linear)}


def test_new_stacks_change_nothing(tiny, transformer):
    base = ZImageDenoiser(transformer)
    expected, before = base(*question(tiny)), weights_hash(transformer)
    add_adapter(transformer, "student", 4, 1.0)
    add_adapter(transformer, "fake", 2, 1.0)
    for role in (base, AdapterDenoiser(base, "student"), AdapterDenoiser(base, "fake"), AdapterDenoiser(base, None)):
        torch.testing.assert_close(role(*question(tiny)), expected)
    assert weights_hash(transformer) == before  # a cache made before is the same teacher's


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_stack_of_full_rank_is_a_full_copy(tiny, transformer, tmp_path, scale):
    """Any change of the weights, written as scale B A, speaks, merges and trains as a changed copy does."""
    torch.manual_seed(1)
    full = copy.deepcopy(transformer).requires_grad_(True)
    layers = targeted(full)
    assert len(layers) == 7 * (len(full.layers) + len(full.noise_refiner) + len(full.context_refiner))
    rank = max(min(layer.weight.shape) for layer in layers.values())
    add_adapter(transformer, "student", rank, scale)
    stack = adapter_parameters(transformer, "student")
    for name, layer in layers.items():
        change = 0.05 * torch.randn_like(layer.weight)
        u, s, v = torch.linalg.svd(change, full_matrices=False)
        with torch.no_grad():
            stack[f"{name}.lora_B.student.weight"][:, : len(s)] = u * s / scale
            stack[f"{name}.lora_A.student.weight"][: len(s)] = v
            layer.weight += change
    role, copied = AdapterDenoiser(ZImageDenoiser(transformer), "student"), ZImageDenoiser(full)
    torch.testing.assert_close(role(*question(tiny)), copied(*question(tiny)), atol=1e-4, rtol=1e-4)
    write_merged(tmp_path / "transformer", transformer, "student", shard="200KB")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 2
    plain = load_component(tmp_path, "transformer")
    assert plain.state_dict().keys() == full.state_dict().keys()
    for name, weight in plain.state_dict().items():
        torch.testing.assert_close(weight, full.state_dict()[name], atol=1e-5, rtol=1e-5)

    # d loss / dB is scale (d loss / dW) A^T: gradients of the stack are those of the copy, through the chain rule
    role(*question(tiny)).square().mean().backward()
    copied(*question(tiny)).square().mean().backward()
    for name, layer in layers.items():
        a = stack[f"{name}.lora_A.student.weight"]
        expected = scale * layer.weight.grad @ a.T
        torch.testing.assert_close(stack[f"{name}.lora_B.student.weight"].grad, expected, atol=1e-4, rtol=1e-3)


def test_gradients_reach_their_own_stack_though_others_have_spoken(tiny, transformer):
    for name in ("student", "fake"):
        add_adapter(transformer, name, 3, 1.0)
    base = ZImageDenoiser(transformer)
    student, fake = AdapterDenoiser(base, "student"), AdapterDenoiser(base, "fake")
    loss = student(*question(tiny)).square().mean()
    with torch.no_grad():
        base(*question(tiny))
        fake(*question(tiny))
    loss.backward()
    gradients = {n: p.grad for n, p in transformer.named_parameters() if p.grad is not None}
    assert gradients
    assert all(".lora_" in name and ".student." in name for name in gradients)
    assert len(list(student.parameters())) == len(adapter_parameters(transformer, "student")) == len(gradients)
    assert {id(p) for p in student.parameters()}.isdisjoint({id(p) for p in fake.parameters()})


def test_blocks_run_again_with_the_stack_they_spoke_with(tiny, transformer):
    """Checkpointed, with another role speaking before the backward pass: the gradients of a run without either."""
    torch.manual_seed(2)
    for name in ("student", "fake"):
        add_adapter(transformer, name, 3, 1.0)
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    gradients = []
    for again in (None, capture_adapter_state):
        base = ZImageDenoiser(transformer)
        student, fake = AdapterDenoiser(base, "student"), AdapterDenoiser(base, "fake")
        if again is not None:
            base.enable_gradient_checkpointing(again)
        transformer.zero_grad()
        loss = student(*question(tiny)).square().mean()
        with torch.no_grad():
            fake(*question(tiny))
        loss.backward()
        gradients.append([p.grad.clone() for p in student.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)
    assert all(p.grad is None for p in fake.parameters())


@pytest.mark.slow
def test_compiled_roles_speak_and_learn_the_same_and_nothing_is_compiled_again(tiny, transformer):
    """All at once: stacks in turn on a base of 8 bits, checkpointed, under autocast."""
    quantize_fp8_(transformer.bfloat16())
    for name in ("student", "fake"):
        add_adapter(transformer, name, 3, 1.0)
        for parameter in adapter_parameters(transformer, name).values():
            torch.nn.init.normal_(parameter, std=0.05)
    eager, compiled = ZImageDenoiser(transformer), ZImageDenoiser(transformer)
    compiled.compile_repeated_blocks()
    for denoiser in (eager, compiled):
        denoiser.enable_gradient_checkpointing(capture_adapter_state)
    graphs = []

    def said(denoiser, stack, learns):
        with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(learns):
            velocity = AdapterDenoiser(denoiser, stack)(*question(tiny))
        if not learns:
            return velocity, {}
        transformer.zero_grad()
        velocity.square().mean().backward()
        return velocity.detach(), {key: p.grad.clone() for key, p in adapter_parameters(transformer, stack).items()}

    for _ in range(2):
        for stack, learns in ((None, False), ("student", False), ("student", True), ("fake", False), ("fake", True)):
            (velocity, gradients), (expected, wanted) = (said(d, stack, learns) for d in (compiled, eager))
            assert 0 < (velocity - expected).abs().max() < 0.1  # other roundings: it was compiled
            for key, gradient in gradients.items():
                torch.testing.assert_close(gradient, wanted[key], atol=0.05 * wanted[key].abs().max().item(), rtol=0.1)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert 8 < graphs[0] == graphs[1]


def test_a_run_resumes_exactly_and_its_files_open_elsewhere(tiny, tiny_folder, tmp_path):
    more = [f"teacher={tiny_folder}", *SHORT, "roles.kind=lora", "roles.rank=4", "roles.fake_rank=2", "roles.scale=2.0"]
    more += ["gradient_checkpointing=true"]
    more += ["optim.student={lr: 0.05, ema_decay: 0.5}", "optim.fake={lr: 0.01}"]
    made = api.distill("micro-turbo", tmp_path / "whole", overrides=[*more, "train.steps=3"])
    api.distill("micro-turbo", tmp_path / "parts", overrides=[*more, "train.steps=2"])
    api.distill("micro-turbo", tmp_path / "parts", overrides=[*more, "train.steps=3"])
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

    # the stack alone, loaded by diffusers onto the teacher, draws what the merged student draws
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


def test_mistakes(tiny_folder):
    def roles(*overrides):
        recipe = load_recipe("micro-turbo", [f"teacher={tiny_folder}", "roles.kind=lora", *overrides])
        return build_models(recipe, load(tiny_folder))

    with pytest.raises(UserError, match="same rank"):
        roles("fake_follow=0.1", "roles.fake_rank=1")
    with pytest.raises(UserError, match=r"roles\.targets to_x"):
        roles("roles.targets=[to_x]")


def test_a_stack_starts_from_that_of_an_earlier_run(tiny_folder, tmp_path):
    more = ["roles.kind=lora", "roles.rank=2", "roles.scale=0.5", "train.steps=1", "optim.student={lr: 0.01}"]
    overrides = [f"teacher={tiny_folder}", *SHORT, *more]
    first = api.distill("micro-turbo", tmp_path / "first", overrides=overrides).student
    recipe = load_recipe("micro-turbo", [*overrides, f"init={first}"])
    roles = build_models(recipe, load(tiny_folder))
    stack = adapter_parameters(roles.teacher.transformer, "student")
    assert max(p.abs().max() for name, p in stack.items() if "lora_B" in name) > 1e-4
    prompts, x, sigma = roles.teacher.encode(["a fox"]), torch.randn(1, 16, 8, 8), torch.ones(1)
    with torch.no_grad():
        expected = load(first).denoiser(x, sigma, prompts)
        torch.testing.assert_close(roles.student.denoiser(x, sigma, prompts), expected, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(roles.teacher.denoiser(x, sigma, prompts), expected, atol=1e-4)
    with pytest.raises(UserError, match="another rank"):
        build_models(load_recipe("micro-turbo", [*overrides, f"init={first}", "roles.rank=3"]), load(tiny_folder))
    with pytest.raises(UserError, match="a student starts from that of a run with LoRA roles"):
        build_models(load_recipe("micro-turbo", [*overrides, f"init={tiny_folder}"]), load(tiny_folder))


def test_bf16_base_with_fp32_stacks(tiny_folder, tmp_path):
    """The base takes half the memory, stacks are fp32 and learn; the student is the base and its stack."""
    more = ("roles.kind=lora", "roles.base=bf16", "roles.rank=4", "train.steps=2", "train.precision=bf16")
    out = tmp_path / "run"
    overrides = [f"teacher={tiny_folder}", *SHORT, *more, "optim.student={lr: 0.01}"]
    recipe = load_recipe("micro-turbo", overrides)
    teacher = load(tiny_folder, dtype=torch.bfloat16)
    roles = build_models(recipe, teacher)
    dtypes = {(".lora_" in name, p.dtype) for name, p in teacher.transformer.named_parameters()}
    assert dtypes == {(False, torch.bfloat16), (True, torch.float32)}
    assert {p.dtype for p in roles.student.denoiser.parameters()} == {torch.float32}

    api.distill("micro-turbo", out, overrides=overrides)
    lora = load_file(out / "lora" / "pytorch_lora_weights.safetensors")
    assert {tensor.dtype for tensor in lora.values()} == {torch.float32}
    assert any(tensor.abs().max() > 0 for name, tensor in lora.items() if "lora_B" in name)
    merged_student, base = load(out / "student", dtype=torch.float32), load(tiny_folder)
    name = "layers.0.attention.to_q"
    added = lora[f"transformer.{name}.lora_B.weight"] @ lora[f"transformer.{name}.lora_A.weight"]
    expected = base.transformer.get_submodule(name).weight.bfloat16().float() + added
    torch.testing.assert_close(merged_student.transformer.get_submodule(name).weight, expected, atol=1e-2, rtol=1e-2)
