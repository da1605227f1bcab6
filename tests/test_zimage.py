"""The batched forward against diffusers' own, batches against single samples, and blocks in every combination."""

import copy

import pytest
import torch
from diffusers import ZImageTransformer2DModel
from diffusers.models.attention_dispatch import attention_backend
from zimage_setup import prompts_of, small_transformer

from fewstep.core.conditioning import EncodedPrompts
from fewstep.errors import UserError
from fewstep.export.diffusers import to_diffusers
from fewstep.models.adapters import active_adapters, adapter_parameters, add_adapter
from fewstep.models.offload import offload_blocks
from fewstep.models.zimage.block import ZImageBlock
from fewstep.models.zimage.denoiser import ZImageDenoiser
from fewstep.models.zimage.family import ZIMAGE


@pytest.fixture
def transformer():
    return small_transformer()


def diffusers_velocity(model, x, sigma, prompts):
    """diffusers' own forward, on a plain model or one with fewstep's blocks: takes 1 - sigma, returns -velocity."""
    if isinstance(model.layers[0], ZImageBlock):
        model = to_diffusers(model, ZIMAGE)
    captions = [f[:n] for f, n in zip(prompts.features, prompts.lengths.tolist(), strict=True)]
    out = model([sample[:, None] for sample in x], 1 - sigma, captions, return_dict=False)[0]
    return -torch.stack(out).squeeze(2)


@pytest.mark.parametrize(
    ("lengths", "size"),
    [([5], (8, 8)), ([7, 7, 7], (8, 8)), ([3, 32, 33, 70], (8, 8)), ([9, 40], (12, 16)), ([64, 1], (16, 4))],
)
def test_matches_diffusers(transformer, lengths, size):
    prompts = prompts_of(lengths)
    x, sigma = torch.randn(len(lengths), 16, *size), torch.rand(len(lengths))
    with torch.no_grad():
        ours = ZImageDenoiser(transformer)(x, sigma, prompts)
        theirs = diffusers_velocity(transformer, x, sigma, prompts)
    assert theirs.abs().mean() > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_full_width_matches_diffusers():
    """Z-Image's own width, heads and caption features, two of its thirty layers, at 512 px: 1,024 patches."""
    torch.manual_seed(0)
    model = ZImageTransformer2DModel(n_layers=2, n_refiner_layers=1)
    assert (model.config.dim, model.config.n_heads, model.config.cap_feat_dim) == (3840, 30, 2560)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "pad" not in name:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    prompts = EncodedPrompts(torch.randn(2, 70, 2560), torch.tensor([70, 20]))
    x, sigma = torch.randn(2, 16, 64, 64), torch.tensor([0.9, 0.3])
    with torch.no_grad():
        ours, theirs = ZImageDenoiser(model)(x, sigma, prompts), diffusers_velocity(model, x, sigma, prompts)
    assert theirs.abs().mean() > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_gradients_match_diffusers(transformer):
    prompts, x, sigma = prompts_of([6, 30, 41]), torch.randn(3, 16, 8, 8), torch.rand(3)
    gradients = []
    for velocity in (
        ZImageDenoiser(transformer)(x, sigma, prompts),
        diffusers_velocity(transformer, x, sigma, prompts),
    ):
        transformer.zero_grad()
        velocity.square().mean().backward()
        gradients.append({n: p.grad.clone() for n, p in transformer.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(
            gradient, gradients[1][name], atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_batched_equals_single(transformer):
    prompts, x, sigma = prompts_of([4, 31, 32, 50]), torch.randn(4, 16, 8, 8), torch.rand(4)
    denoiser = ZImageDenoiser(transformer)
    with torch.no_grad():
        together = denoiser(x, sigma, prompts)
        alone = torch.cat([denoiser(x[i : i + 1], sigma[i : i + 1], prompts[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_pad_tokens_are_attended_to(transformer):
    """16 patches and 5 caption tokens are padded to 32 each; the learned pad tokens must affect the result."""
    prompts, x, sigma = prompts_of([5]), torch.randn(1, 16, 8, 8), torch.rand(1)
    denoiser = ZImageDenoiser(transformer)
    with torch.no_grad():
        before = denoiser(x, sigma, prompts)
        for pad in (transformer.x_pad_token, transformer.cap_pad_token):
            saved = pad.clone()
            pad.add_(1.0)
            assert (denoiser(x, sigma, prompts) - before).abs().max() > 1e-4
            pad.copy_(saved)


def test_checkpointed_blocks_give_the_same_gradients(transformer):
    prompts, x, sigma = prompts_of([5, 40]), torch.randn(2, 16, 8, 8), torch.rand(2)
    plain, checkpointed = (ZImageDenoiser(copy.deepcopy(transformer)) for _ in range(2))
    checkpointed.enable_gradient_checkpointing()
    kept, gradients = [], []
    for denoiser in (plain, checkpointed):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            velocity = denoiser(x, sigma, prompts)
        kept.append(sum(sizes))
        velocity.square().mean().backward()
        gradients.append({n: p.grad for n, p in denoiser.named_parameters() if p.grad is not None})
    torch.testing.assert_close(gradients[0], gradients[1])
    assert kept[1] < 0.5 * kept[0]


def test_mixed_sizes_match_diffusers(transformer):
    sizes, lengths = [(8, 8), (12, 4), (8, 8), (16, 8)], [5, 40, 33, 7]
    prompts, sigma = prompts_of(lengths), torch.rand(4)
    samples = [torch.randn(16, *size) for size in sizes]
    with torch.no_grad():
        ours = ZImageDenoiser(transformer).forward_multi_resolution(samples, sigma, prompts)
        for row, sample in enumerate(samples):
            one = slice(row, row + 1)
            theirs = diffusers_velocity(transformer, sample[None], sigma[one], prompts[one])[0]
            assert ours[row].shape == sample.shape
            torch.testing.assert_close(ours[row], theirs, atol=1e-5, rtol=1e-5)


def test_with_lora_matches_diffusers(transformer):
    model = copy.deepcopy(transformer)
    plain = copy.deepcopy(model)
    for each in (model, plain):
        add_adapter(each, "mine", rank=4, alpha=8.0, target_modules=ZIMAGE.lora_target_modules)
    for parameter in adapter_parameters(model, "mine").values():
        torch.nn.init.normal_(parameter, std=0.1)
    plain.load_state_dict(model.state_dict())
    prompts, x, sigma = prompts_of([6, 40]), torch.randn(2, 16, 8, 8), torch.rand(2)
    gradients = []
    for each, run in ((model, ZImageDenoiser(model)), (plain, lambda *inputs: diffusers_velocity(plain, *inputs))):
        with active_adapters(each, {"mine": 1.0}):
            velocity = run(x, sigma, prompts)
            velocity.square().mean().backward()
        gradients.append((velocity.detach(), {name: p.grad for name, p in adapter_parameters(each, "mine").items()}))
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        assert (gradients[0][0] - ZImageDenoiser(model)(x, sigma, prompts)).abs().mean() > 0.01


@pytest.mark.parametrize("lengths", [[5, 9], [5, 40, 7]])
def test_captions_are_computed_once_while_cached(transformer, lengths):
    denoiser, prompts = ZImageDenoiser(transformer), prompts_of(lengths)
    x, calls = torch.randn(len(lengths), 16, 8, 8), []
    handle = transformer.cap_embedder.register_forward_hook(lambda *_: calls.append(1))
    try:
        with torch.no_grad():
            plain = [denoiser(x, torch.full((len(x),), sigma), prompts) for sigma in (1.0, 0.5, 0.2)]
            calls.clear()
            with denoiser.cache_text_tokens():
                cached = [denoiser(x, torch.full((len(x),), sigma), prompts) for sigma in (1.0, 0.5, 0.2)]
            assert len(calls) == len({length > 32 for length in lengths})
            for one, other in zip(plain, cached, strict=True):
                assert torch.equal(one, other)
            denoiser(x, torch.ones(len(x)), prompts)
        assert len(calls) == 2 * len({length > 32 for length in lengths})  # nothing is cached outside
    finally:
        handle.remove()


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_attention_uses_the_backend_that_was_set(transformer):
    prompts, x, sigma = prompts_of([5, 9]), torch.randn(2, 16, 8, 8), torch.rand(2)
    model = copy.deepcopy(transformer)
    denoiser, others = ZImageDenoiser(model), []
    with torch.no_grad(), attention_backend("native"):  # the setting is global; this restores it
        before = denoiser(x, sigma, prompts)
        for name in ("_native_math", "flex"):
            model.set_attention_backend(name)
            others.append(denoiser(x, sigma, prompts))
    for other in others:
        torch.testing.assert_close(before, other, atol=1e-5, rtol=1e-5)
    assert not all(torch.equal(before, other) for other in others)  # another kernel rounds differently


def test_compilation_without_a_compiler_is_refused(transformer, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="no-such-compiler"):
        ZImageDenoiser(transformer).compile_repeated_blocks()


@pytest.mark.slow
def test_compiled_blocks_give_the_same_gradients(transformer):
    prompts, x, sigma = prompts_of([5, 9]), torch.randn(2, 16, 8, 8), torch.rand(2)
    eager, compiled = (ZImageDenoiser(copy.deepcopy(transformer)) for _ in range(2))
    compiled.compile_repeated_blocks()
    gradients = []
    for denoiser in (eager, compiled):
        velocity = denoiser(x, sigma, prompts)
        velocity.square().mean().backward()
        gradients.append((velocity.detach(), denoiser.transformer.layers[0].attention.to_q.weight.grad))
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("offloaded", [False, True])
def test_one_shape_is_compiled_once(transformer, offloaded):
    denoiser, graphs = ZImageDenoiser(copy.deepcopy(transformer)), []
    denoiser.compile_repeated_blocks()
    if offloaded:
        offload_blocks(denoiser, "cpu")
    with torch.no_grad():
        for seed in range(3):
            x, sigma = torch.randn(2, 16, 8, 8), torch.rand(2)
            denoiser(x, sigma, prompts_of([5 + seed, 9], seed))
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert 0 < graphs[0] == graphs[1] == graphs[2]


def test_state_dict_is_that_of_diffusers(transformer):
    plain = copy.deepcopy(transformer)
    names = list(plain.state_dict())
    assert list(ZImageDenoiser(plain).transformer.state_dict()) == names
    assert list(to_diffusers(plain, ZIMAGE).state_dict()) == names
