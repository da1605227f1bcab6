"""LoRA adapters on one base: equal to full copies, without state that leaks; their files open in diffusers."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from fewstep.data.trajectories import weights_hash
from fewstep.models.adapter_files import adapter_state_dict, write_merged
from fewstep.models.adapters import AdapterDenoiser, active_adapters, adapter_layers, adapter_parameters, add_adapter
from fewstep.models.components import load_component
from fewstep.models.quantize import quantize_fp8_
from fewstep.models.zimage.denoiser import ZImageDenoiser
from fewstep.models.zimage.family import ZIMAGE


@pytest.fixture
def transformer(tiny):
    return copy.deepcopy(tiny.transformer)


TARGETS = ZIMAGE.lora_target_modules


def inputs(tiny, seed=0):
    torch.manual_seed(seed)
    prompts = tiny.encode(["a dog", "a cat on a mat"])
    return torch.randn(2, 16, 8, 8), torch.rand(2), prompts


def targeted(model):
    return {n: m for n, m in model.named_modules() if n.endswith(TARGETS) and isinstance(m, torch.nn.Linear)}


def test_new_adapters_change_nothing(tiny, transformer):
    base = ZImageDenoiser(transformer)
    expected, before = base(*inputs(tiny)), weights_hash(transformer)
    add_adapter(transformer, "student", 4, target_modules=TARGETS)
    add_adapter(transformer, "fake", 2, target_modules=TARGETS)
    for adapters in ({"student": 1.0}, {"fake": 1.0}, {"student": 0.5, "fake": 2.0}, {}):
        torch.testing.assert_close(AdapterDenoiser(base, adapters)(*inputs(tiny)), expected)
    torch.testing.assert_close(base(*inputs(tiny)), expected)
    assert weights_hash(transformer) == before  # a trajectory cache of the teacher stays valid


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_an_adapter_of_full_rank_is_a_full_copy(tiny, transformer, tmp_path, scale):
    """Any change of the weights, written as scale B A, infers, merges and trains as a changed copy does."""
    torch.manual_seed(1)
    full = copy.deepcopy(transformer).requires_grad_(True)
    layers = targeted(full)
    assert len(layers) == 7 * (len(full.layers) + len(full.noise_refiner) + len(full.context_refiner))
    rank = max(min(layer.weight.shape) for layer in layers.values())
    add_adapter(transformer, "student", rank, rank * scale, target_modules=TARGETS)
    adapter = adapter_parameters(transformer, "student")
    for name, layer in layers.items():
        change = 0.05 * torch.randn_like(layer.weight)
        u, s, v = torch.linalg.svd(change, full_matrices=False)
        with torch.no_grad():
            adapter[f"{name}.lora_B.student.weight"][:, : len(s)] = u * s / scale
            adapter[f"{name}.lora_A.student.weight"][: len(s)] = v
            layer.weight += change
    adapted, copied = AdapterDenoiser(ZImageDenoiser(transformer), {"student": 1.0}), ZImageDenoiser(full)
    torch.testing.assert_close(adapted(*inputs(tiny)), copied(*inputs(tiny)), atol=1e-4, rtol=1e-4)
    write_merged(tmp_path / "transformer", transformer, {"student": 1.0}, shard="200KB")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 2
    plain = load_component(tmp_path, "transformer", family=ZIMAGE)
    assert plain.state_dict().keys() == full.state_dict().keys()
    for name, weight in plain.state_dict().items():
        torch.testing.assert_close(weight, full.state_dict()[name], atol=1e-5, rtol=1e-5)

    # d loss / dB is scale (d loss / dW) A^T: gradients of the adapter are those of the copy, through the chain rule
    adapted(*inputs(tiny)).square().mean().backward()
    copied(*inputs(tiny)).square().mean().backward()
    for name, layer in layers.items():
        a = adapter[f"{name}.lora_A.student.weight"]
        expected = scale * layer.weight.grad @ a.T
        torch.testing.assert_close(adapter[f"{name}.lora_B.student.weight"].grad, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("rank", "factor"), [(2, None), (2, 4), (500, 4)])
def test_a_lokr_adds_a_kronecker_product(tiny, transformer, rank, factor):
    base = ZImageDenoiser(transformer)
    plain, before = copy.deepcopy(transformer), weights_hash(transformer)
    add_adapter(transformer, "student", rank, 3 * rank, target_modules=TARGETS, kind="lokr", factor=factor)
    student = AdapterDenoiser(base, {"student": 0.5})
    torch.testing.assert_close(student(*inputs(tiny)), ZImageDenoiser(plain)(*inputs(tiny)))
    for parameter in student.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    adapter = adapter_parameters(transformer, "student")
    for name, layer in targeted(plain).items():
        own = {key.split(".")[-2]: value for key, value in adapter.items() if key.startswith(f"{name}.")}
        whole = own.get("lokr_w2")
        right = own["lokr_w2_a"] @ own["lokr_w2_b"] if whole is None else whole
        assert (whole is not None) == (rank == 500)
        if factor is not None:
            assert tuple(own["lokr_w1"].shape) == (factor, factor)
        with torch.no_grad():
            layer.weight += 0.5 * 3 * torch.kron(own["lokr_w1"], right)
    torch.testing.assert_close(student(*inputs(tiny)), ZImageDenoiser(plain)(*inputs(tiny)), atol=1e-4, rtol=1e-4)
    assert weights_hash(transformer) == before


@pytest.mark.parametrize("kind", ["lora", "lokr"])
def test_gradients_reach_only_the_adapter_that_was_active(tiny, transformer, kind):
    for name in ("student", "fake"):
        add_adapter(transformer, name, 3, target_modules=TARGETS, kind=kind)
    base = ZImageDenoiser(transformer)
    student, fake = AdapterDenoiser(base, {"student": 1.0}), AdapterDenoiser(base, {"fake": 1.0})
    loss = student(*inputs(tiny)).square().mean()
    with torch.no_grad():
        base(*inputs(tiny))
        fake(*inputs(tiny))
    loss.backward()
    gradients = {n: p.grad for n, p in transformer.named_parameters() if p.grad is not None}
    assert gradients
    assert gradients.keys() == adapter_parameters(transformer, "student").keys()
    assert len(list(student.parameters())) == len(adapter_parameters(transformer, "student")) == len(gradients)
    assert {id(p) for p in student.parameters()}.isdisjoint({id(p) for p in fake.parameters()})


def test_checkpointed_blocks_are_recomputed_with_the_adapter_that_was_active(tiny, transformer):
    """Another adapter is active between forward and backward pass; gradients are those without checkpointing."""
    torch.manual_seed(2)
    for name in ("student", "fake"):
        add_adapter(transformer, name, 3, target_modules=TARGETS)
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    gradients = []
    for checkpointing in (False, True):
        base = ZImageDenoiser(transformer)
        student, fake = AdapterDenoiser(base, {"student": 0.7}), AdapterDenoiser(base, {"fake": 1.0})
        if checkpointing:
            base.enable_gradient_checkpointing()
        transformer.zero_grad()
        loss = student(*inputs(tiny)).square().mean()
        with torch.no_grad():
            fake(*inputs(tiny))
        loss.backward()
        gradients.append([p.grad.clone() for p in student.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)
    assert all(p.grad is None for p in fake.parameters())


@pytest.mark.slow
def test_compiled_adapters_infer_and_train_the_same_without_recompilation(tiny, transformer):
    """All at once: adapters in turn on an fp8 base, checkpointed, under autocast."""
    quantize_fp8_(transformer.bfloat16(), ZIMAGE.quantizable_modules)
    for name in ("student", "fake"):
        add_adapter(transformer, name, 3, target_modules=TARGETS)
        for parameter in adapter_parameters(transformer, name).values():
            torch.nn.init.normal_(parameter, std=0.05)
    eager, compiled = (ZImageDenoiser(copy.deepcopy(transformer)) for _ in range(2))
    compiled.compile_repeated_blocks()
    for denoiser in (eager, compiled):
        denoiser.enable_gradient_checkpointing()
    graphs = []

    def run(denoiser, adapter, trains):
        adapted = AdapterDenoiser(denoiser, {adapter: 1.0} if adapter else {})
        with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(trains):
            velocity = adapted(*inputs(tiny))
        if not trains:
            return velocity, {}
        adapted.zero_grad()
        velocity.square().mean().backward()
        return velocity.detach(), {key: p.grad.clone() for key, p in adapted.named_parameters()}

    for _ in range(2):
        for adapter, trains in ((None, False), ("student", False), ("student", True), ("fake", False), ("fake", True)):
            (velocity, gradients), (expected, wanted) = (run(d, adapter, trains) for d in (compiled, eager))
            assert 0 < (velocity - expected).abs().max() < 0.1  # different rounding shows that it is compiled
            for key, gradient in gradients.items():
                torch.testing.assert_close(gradient, wanted[key], atol=0.05 * wanted[key].abs().max().item(), rtol=0.1)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert 8 < graphs[0] == graphs[1]


# --- several adapters at once -----------------------------------------------------------------------------------------


@pytest.fixture
def two_adapters(transformer):
    """Adapters of different rank and alpha, one of them on attention alone."""
    torch.manual_seed(3)
    add_adapter(transformer, "style", 4, 2.0, target_modules=TARGETS)
    add_adapter(transformer, "turbo", 2, target_modules=("to_q", "to_v"))
    for name in ("style", "turbo"):
        for parameter in adapter_parameters(transformer, name).values():
            torch.nn.init.normal_(parameter, std=0.1)
    return transformer


def test_adapters_add_up_with_their_scales(tiny, two_adapters, tmp_path):
    adapters = {"style": 0.7, "turbo": -0.4}
    added = AdapterDenoiser(ZImageDenoiser(two_adapters), adapters)(*inputs(tiny))
    merged = copy.deepcopy(tiny.transformer)
    with torch.no_grad():
        for adapter, factor in (("style", 0.7 * 2.0 / 4), ("turbo", -0.4)):
            weights, ending = adapter_parameters(two_adapters, adapter), f".lora_A.{adapter}.weight"
            for name in [name for name in weights if name.endswith(ending)]:
                layer = merged.get_submodule(name.removesuffix(ending))
                layer.weight += factor * weights[name.replace("lora_A", "lora_B")] @ weights[name]
    torch.testing.assert_close(added, ZImageDenoiser(merged)(*inputs(tiny)), atol=1e-4, rtol=1e-4)
    assert (added - AdapterDenoiser(ZImageDenoiser(two_adapters), {"style": 0.7})(*inputs(tiny))).abs().max() > 1e-3

    write_merged(tmp_path / "transformer", two_adapters, adapters)
    written = load_component(tmp_path, "transformer", family=ZIMAGE).state_dict()
    torch.testing.assert_close(written, merged.state_dict(), atol=1e-5, rtol=1e-5)


def test_adapter_state_does_not_leak(tiny, two_adapters):
    """After any use, nested or ended by an error, the transformer is its base, with every scale as it was."""
    base = ZImageDenoiser(two_adapters)
    expected = base(*inputs(tiny))
    full, half = AdapterDenoiser(base, {"style": 1.0}), AdapterDenoiser(base, {"style": 0.5, "turbo": 1.0})
    scaling = [dict(layer.scaling) for layer in adapter_layers(two_adapters)]
    file = adapter_state_dict(two_adapters, "style")
    first = full(*inputs(tiny))
    half(*inputs(tiny))
    assert torch.equal(full(*inputs(tiny)), first)
    with active_adapters(two_adapters, {"style": 0.5, "turbo": 1.0}):
        inside = base(*inputs(tiny))
        assert torch.equal(full(*inputs(tiny)), first)
        assert torch.equal(base(*inputs(tiny)), inside)
    with pytest.raises(RuntimeError, match="stop"), active_adapters(two_adapters, {"turbo": 3.0}):
        raise RuntimeError("stop")
    assert torch.equal(base(*inputs(tiny)), expected)
    assert [dict(layer.scaling) for layer in adapter_layers(two_adapters)] == scaling
    assert all(torch.equal(tensor, file[name]) for name, tensor in adapter_state_dict(two_adapters, "style").items())


def test_an_unknown_adapter_is_an_error(tiny, two_adapters):
    denoiser = AdapterDenoiser(ZImageDenoiser(two_adapters), {"faster": 1.0})
    with pytest.raises(ValueError, match="no LoRA adapter named faster"):
        denoiser(*inputs(tiny))


def test_a_scale_that_changes_at_each_step_is_compiled_once(tiny, transformer):
    """DynaDG's scale is a tensor: a number would be a constant of the compiled code."""
    add_adapter(transformer, "fake", 2, target_modules=TARGETS)
    for parameter in adapter_parameters(transformer, "fake").values():
        torch.nn.init.normal_(parameter, std=0.2)
    layer, x = adapter_layers(transformer)[0], torch.randn(2, 48)
    compiled = {}
    for kind in (float, torch.tensor):
        torch._dynamo.reset()
        counter = CompileCounter()
        forward = torch.compile(layer, backend=counter, dynamic=False)
        for scale in (0.5, 0.3, 0.1):
            with active_adapters(transformer, {"fake": kind(scale)}):
                found = forward(x)
            with active_adapters(transformer, {"fake": scale}):
                torch.testing.assert_close(found, layer(x))
        compiled[kind] = counter.frame_count
    assert compiled == {float: 3, torch.tensor: 1}
