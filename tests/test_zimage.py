"""Our batched forward against diffusers' own, and batches against single samples."""

import pytest
import torch
from diffusers import ZImageTransformer2DModel

from fewstep.errors import UserError
from fewstep.models.prompts import EncodedPrompts
from fewstep.models.zimage import ZImageDenoiser

FEATURES = 24


@pytest.fixture(scope="module")
def transformer():
    torch.manual_seed(0)
    model = ZImageTransformer2DModel(
        dim=48, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=FEATURES, axes_dims=[8, 8, 8],
        axes_lens=[512, 64, 64],
    )  # fmt: skip
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def prompts_of(lengths, seed=0):
    torch.manual_seed(seed)
    features = torch.randn(len(lengths), max(lengths), FEATURES)
    for row, length in enumerate(lengths):
        features[row, length:] = 0
    return EncodedPrompts(features, torch.tensor(lengths))


def diffusers_velocity(model, x, sigma, prompts):
    """Straight through diffusers: takes 1 - sigma, returns -velocity, one list entry a sample."""
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
    """16 patches and 5 caption tokens are filled up to 32 each; the learned pad tokens must have a say."""
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
    plain, checkpointed = ZImageDenoiser(transformer), ZImageDenoiser(transformer)
    checkpointed.checkpoint_blocks()
    kept, gradients = [], []
    for denoiser in (plain, checkpointed):
        transformer.zero_grad()
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            velocity = denoiser(x, sigma, prompts)
        kept.append(sum(sizes))
        velocity.square().mean().backward()
        gradients.append({n: p.grad.clone() for n, p in transformer.named_parameters() if p.grad is not None})
    torch.testing.assert_close(gradients[0], gradients[1])
    assert kept[1] < 0.5 * kept[0]


def test_compiling_needs_a_compiler(transformer, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="no-such-compiler"):
        ZImageDenoiser(transformer).compile_blocks()


@pytest.mark.slow
def test_compiled_blocks_give_the_same(transformer):
    prompts, x, sigma = prompts_of([5, 9]), torch.randn(2, 16, 8, 8), torch.rand(2)
    eager, compiled = ZImageDenoiser(transformer), ZImageDenoiser(transformer)
    compiled.compile_blocks()
    gradients = []
    for denoiser in (eager, compiled):
        transformer.zero_grad()
        velocity = denoiser(x, sigma, prompts)
        velocity.square().mean().backward()
        gradients.append((velocity.detach(), transformer.layers[0].attention.to_q.weight.grad.clone()))
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5, rtol=1e-4)
