"""Transformers compiled ahead of time: equal to eager for every prompt and batch, and refused for other models."""

import json
import zipfile

import pytest
import torch
from typer.testing import CliRunner

from fewstep.cli.main import app
from fewstep.errors import UserError
from fewstep.inference.generate import generate
from fewstep.inference.params import SamplingParams
from fewstep.models.ahead_of_time import AheadOfTime, describe, load_package
from fewstep.models.pipeline import load

PROMPTS = ["a fox", "a red apple", "the moon " * 20]


def latents(pipeline, count):
    x = torch.randn(count, *pipeline.latent_shape(64, 64))
    return x, torch.linspace(0.9, 0.2, count)


def package(path, pipeline, **changes):
    """A package without machine code."""
    described = describe(pipeline.denoiser, 2, (16, 8, 8))
    content = json.loads(described["fewstep"]) | changes
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(
            "model/data/aotinductor/model/x.wrapper_metadata.json", json.dumps({"fewstep": json.dumps(content)})
        )
    return path


def test_batches_are_filled_up():
    """Five samples in calls of two."""
    calls = []

    def compiled(x, sigma, text, freqs):
        calls.append(len(x))
        return x * sigma[:, None, None, None] + text.sum() * 0 + freqs

    x, sigma = torch.randn(5, 3, 2, 2), torch.rand(5)
    found = AheadOfTime(compiled, 2, (3, 2, 2), {})(x, sigma, torch.zeros(5, 4, 4), torch.tensor(1.0))
    assert calls == [2, 2, 2]
    assert torch.allclose(found, x * sigma[:, None, None, None] + 1)


def test_other_sizes_are_refused():
    run = AheadOfTime(lambda *inputs: inputs[0], 2, (3, 2, 4), {})
    with pytest.raises(UserError, match="the package is for latents of 2x4, not 4x4"):
        run(torch.zeros(1, 3, 4, 4), torch.zeros(1), torch.zeros(1, 1, 1), torch.zeros(1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"torch": "1.0"}, r"was made for another torch 1.0, not 2.*; export it again"),
        ({"dtype": "bfloat16"}, "was made for another dtype bfloat16, not float32"),
        ({"device": "cuda"}, "was made for another device cuda, not cpu"),
        ({"architecture": "?"}, "was made for another architecture; export"),
        ({}, "cannot be loaded"),
    ],
)
def test_packages_of_other_models_are_refused(tmp_path, tiny, changes, message):
    with pytest.raises(UserError, match=f"a.pt2: {message}"):
        load_package(package(tmp_path / "a.pt2", tiny, **changes), tiny.denoiser)


def test_other_files_are_refused(tmp_path, tiny):
    (tmp_path / "a.pt2").write_bytes(b"none")
    with pytest.raises(UserError, match="not a package of fewstep export --aot, or damaged"):
        load_package(tmp_path / "a.pt2", tiny.denoiser)
    with pytest.raises(UserError, match=r"b.pt2: no such file"):
        load_package(tmp_path / "b.pt2", tiny.denoiser)


def test_a_family_without_it_is_refused(tiny):
    from fewstep.models.denoiser import TransformerDenoiser

    with pytest.raises(UserError, match="cannot be compiled ahead of time; use compile"):
        TransformerDenoiser.graph_example(tiny.denoiser, 1, (16, 8, 8))


@pytest.mark.slow
def test_compiled_equals_eager(tmp_path, tiny_folder):
    """Any number of samples and any length of captions, from one package; weights that change are followed."""
    file = tmp_path / "fox.pt2"
    words = ["export", str(tiny_folder), "--aot", "--size", "64", "--batch", "2", "--out", str(file)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert file.stat().st_size < 4e6  # without weights
    plain, compiled = load(tiny_folder, "cpu"), load(tiny_folder, "cpu", aot=file)
    prompts = plain.encode(PROMPTS)
    x, sigma = latents(plain, 3)
    with torch.no_grad():
        expected = plain.denoiser(x, sigma, prompts)
        assert torch.allclose(compiled.denoiser(x, sigma, prompts), expected, atol=1e-4 * float(expected.abs().max()))
        for pipeline in (plain, compiled):
            pipeline.transformer.layers[0].feed_forward.w1.weight.mul_(3)
        changed = plain.denoiser(x, sigma, prompts)
        assert not torch.allclose(changed, expected, atol=1e-2)
        assert torch.allclose(compiled.denoiser(x, sigma, prompts), changed, atol=1e-4 * float(changed.abs().max()))
    params = SamplingParams(steps=3, seed=5)
    one, other = (generate(pipeline, PROMPTS, params).images.float() for pipeline in (plain, compiled))
    assert (one - other).abs().max() <= 1
    with pytest.raises(UserError, match="cache taylor: a package computes all layers at once"):
        generate(compiled, PROMPTS, SamplingParams(cache="taylor"))
