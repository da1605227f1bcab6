"""Reuse of layers between steps: what runs, what comes out, and that images do not depend on their batch."""

import pytest
import torch

from fewstep.errors import UserError
from fewstep.inference.generate import generate
from fewstep.inference.params import SamplingParams, parse_params
from fewstep.models.layer_cache import CacheSettings, LayerCache

PROMPTS = ["a noto emoji of a fox on a blue background", "a red apple"]


def tokens_of(step):
    """Two samples: the first hardly changes, the second changes much."""
    base = torch.arange(1.0, 13.0).reshape(2, 3, 2)
    return base + torch.tensor([0.001, 5.0])[:, None, None] * step


class Layers:
    """``tokens * (1 + sigma)`` after the first layer, plus ten times that after all; records what ran."""

    def __init__(self):
        self.sigma, self.ran = 0.0, []

    def __call__(self, tokens, layers, rows):
        self.ran.append((layers.start, layers.stop, None if rows is None else rows.tolist()))
        if layers == slice(0, 1):
            return tokens + tokens
        return tokens * (11 + self.sigma)


def outputs(method, steps=6):
    cache, layers, found = LayerCache(CacheSettings.parse(method)), Layers(), []
    for step in range(steps):
        layers.sigma = 1 - step / steps
        found.append(cache("key", tokens_of(step), torch.full((2,), layers.sigma), layers))
    return found, layers.ran


def test_interval_runs_every_second_step():
    found, ran = outputs("interval")
    assert ran == [(None, None, None)] * 3
    assert torch.equal(found[1], tokens_of(1) + (found[0] - tokens_of(0)))


def test_taylor_is_exact_where_residuals_are_linear():
    """Its residual here is linear in sigma for the first sample, whose tokens are nearly constant."""
    found, ran = outputs("taylor:3")
    assert len(ran) == 3  # steps 0 and 1 give the slope, then step 3
    for step in range(6):
        expected = tokens_of(step) * (11 + 1 - step / 6)
        assert torch.allclose(found[step][0], expected[0], rtol=2e-3), step
    plain = outputs("interval:3")[0]
    expected = tokens_of(2) * (11 + 1 - 2 / 6)
    assert (found[2] - expected)[0].abs().max() < 0.1 * (plain[2] - expected)[0].abs().max()


def test_first_block_decides_for_each_sample():
    found, ran = outputs("first-block:0.2", steps=3)
    assert ran[:2] == [(0, 1, None), (1, None, None)]  # the first step
    assert ran[2:] == [(0, 1, None), (1, None, [1]), (0, 1, None), (1, None, [1])]
    assert torch.equal(found[2][1], 2 * tokens_of(2)[1] * (11 + 1 - 2 / 3))


def test_keys_have_states_of_their_own():
    cache, layers = LayerCache(CacheSettings("interval", 2)), Layers()
    for key in ("a", "b", "a", "b"):
        cache(key, tokens_of(0), torch.ones(2), layers)
    assert len(layers.ran) == 2


@pytest.mark.parametrize("method", ["first-block:2", "interval:3", "taylor:3"])
def test_images_do_not_depend_on_their_batch(tiny, method):
    params = {"steps": 8, "guidance_scale": 2.0, "cache": method, "seed": 4}
    plain = generate(tiny, PROMPTS, SamplingParams(**params | {"cache": None})).images
    together = generate(tiny, PROMPTS, SamplingParams(**params)).images
    alone = generate(tiny, PROMPTS, SamplingParams(**params, batch_size=1)).images
    assert torch.equal(together, alone)
    assert not torch.equal(together, plain)
    assert tiny.denoiser.layer_cache is None


def test_a_threshold_that_nothing_stays_below_changes_nothing(tiny):
    params = SamplingParams(steps=4, guidance_scale=2.0, seed=4)
    tight = params.model_copy(update={"cache": "first-block:1e-9"})
    assert torch.equal(generate(tiny, PROMPTS, params).images, generate(tiny, PROMPTS, tight).images)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dicache", "cache: 'dicache' is not a method; take one of: first-block, interval, taylor"),
        ("first-block:0", "cache: the threshold of first-block must be positive, not 0"),
        ("taylor:1", "cache: the interval of taylor must be a whole number of steps, at least 2, not 1"),
        ("interval:2.5", "cache: the interval of interval must be a whole number of steps, at least 2, not 2.5"),
        ("interval:two", "cache: 'two' is not a number"),
    ],
)
def test_bad_settings(text, message):
    with pytest.raises(UserError) as caught:
        parse_params({"cache": text})
    assert str(caught.value).startswith(message)


def test_families_without_it_are_refused(tiny, monkeypatch):
    monkeypatch.setattr(type(tiny.denoiser), "can_reuse_layers", False)
    with pytest.raises(UserError, match="cache taylor: ZImageDenoiser cannot reuse layers"):
        generate(tiny, PROMPTS, SamplingParams(cache="taylor"))
