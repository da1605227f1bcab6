"""Sampling parameters: defaults of the generation config, and one validation for all who give them."""

import json
import shutil
import warnings

import pytest
import torch

import fewstep
from fewstep.errors import UserError
from fewstep.inference.generate import generate
from fewstep.inference.params import SamplingParams, parse_params
from fewstep.models.generation_config import GenerationConfig
from fewstep.models.pipeline import load

PROMPTS = ["a noto emoji of a red apple on a blue background", "a fox"]


def test_generation_config_is_the_default(tiny):
    assert generate(tiny, PROMPTS[:1]).nfe == 12  # 6 steps, guided
    assert generate(tiny, PROMPTS[:1], SamplingParams(guidance_scale=0)).nfe == 6
    config = GenerationConfig(steps=4, sampler="sde", eta=0.5, height=512, width=256, system_prompt="Draw.")
    found = SamplingParams(eta=0.25, width=1024).resolved(config)
    assert (found.steps, found.sampler, found.eta, found.height, found.width) == (4, "sde", 0.25, 512, 1024)
    assert (found.system_prompt, found.guidance_scale, found.batch_size) == ("Draw.", 0.0, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stepz": 4}, "unknown key stepz; did you mean steps?"),
        ({"guidance": 4}, "unknown key guidance; did you mean guidance_scale?"),
        ({"steps": 0}, "steps: .*greater than or equal to 1 .*0"),
        ({"eta": 2}, "eta: .*less than or equal to 1 .*2"),
        ({"guidance_scale": -1}, "guidance_scale: "),
        ({"guidance_scale": float("nan")}, "guidance_scale: "),
        ({"cfg_truncation": 1.5}, "cfg_truncation: "),
        ({"cfg_normalization": -1}, "cfg_normalization: "),
        ({"height": 0}, "height: "),
        ({"sampler": "renoise"}, "sampler: .*'euler' or 'sde'"),
        ({"seeds": ["one"]}, "seeds.0: "),
    ],
)
def test_wrong_option_is_named(options, message):
    with pytest.raises(UserError, match=message) as error:
        parse_params(options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": (1, 2, 3)}, "seeds: 3 for 2 prompts"),
        ({"height": 65}, "height 65 is not a multiple of 16"),
        ({"adapters": {"style": 1.0}}, "adapters: no LoRA adapter named style"),
    ],
)
def test_option_that_does_not_fit_the_model_is_named(tiny, options, message):
    with pytest.raises(UserError, match=message):
        fewstep.generate(tiny, PROMPTS, **options)
    with pytest.raises(UserError, match="no prompts"):
        fewstep.generate(tiny, [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"negative_prompt": "a dog"}, "negative_prompt: no effect without guidance"),
        ({"cfg_truncation": 0.5, "cfg_normalization": 1}, "cfg_normalization, cfg_truncation: no effect without"),
        ({"eta": 0.5}, "eta: no effect on the euler sampler"),
    ],
)
def test_option_without_effect_is_a_warning(options, message):
    with pytest.warns(UserWarning, match=message):
        parse_params(options).resolved(GenerationConfig())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parse_params(options | {"guidance_scale": 1, "sampler": "sde"}).resolved(GenerationConfig())


@pytest.mark.parametrize(
    ("counts", "steps", "trained"), [(None, 2, "4"), ([1, 4, 2], 3, "1, 2, 4"), ([1, 4, 2], 2, None)]
)
def test_another_number_of_steps_than_trained_is_a_warning(counts, steps, trained):
    config = GenerationConfig(steps=4, step_counts=counts, guidance_distilled=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        SamplingParams(steps=steps).resolved(config)
    told = f"this model was trained for {trained} steps, not {steps}: expect worse images"
    assert [str(each.message) for each in caught] == ([] if trained is None else [told])


def test_system_prompt_of_the_generation_config_is_the_default(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    config = json.loads((folder / "fewstep.json").read_text())
    (folder / "fewstep.json").write_text(json.dumps(config | {"system_prompt": "You draw."}))
    changed, plain = load(folder), load(tiny_folder)

    def images(model, **options):
        return generate(model, ["a fox"], SamplingParams(steps=2, **options)).images

    first = images(changed)
    assert torch.equal(first, images(plain, system_prompt="You draw."))
    assert torch.equal(images(changed, system_prompt=""), images(plain))
    assert not torch.equal(first, images(plain))


@pytest.mark.parametrize("sigmas", [[1.0, 0.9, 0.75, 0.5], [1.0, 0.9, 0.75, 0.5, 0.0]])
def test_guidance_distilled_model_with_its_own_sigmas(tiny_folder, tmp_path, sigmas):
    """With their terminal 0, or without it in folders of earlier versions."""
    folder = shutil.copytree(tiny_folder, tmp_path / "student")
    config = json.loads((folder / "fewstep.json").read_text())
    config |= {"steps": 4, "guidance_scale": 0.0, "guidance_distilled": True, "sigmas": sigmas}
    (folder / "fewstep.json").write_text(json.dumps(config))
    student = load(folder)
    assert student.sigmas(4) == [1.0, 0.9, 0.75, 0.5, 0.0]
    assert len(student.sigmas(5)) == 6
    assert generate(student, PROMPTS[:1]).nfe == 4
    with pytest.raises(UserError, match="guidance distilled into it"):
        generate(student, PROMPTS[:1], SamplingParams(guidance_scale=3))
    with pytest.warns(UserWarning, match="trained for 4 steps, not 9"):
        generate(student, PROMPTS[:1], SamplingParams(steps=9))


@pytest.mark.parametrize(("shift", "nfe"), [(3.0, 8), (6.0, 100)])
def test_folder_without_a_generation_config_is_sampled_by_its_shift(tiny_folder, tmp_path, shift, nfe):
    """A shift of 3 is Z-Image-Turbo's, 6 is Z-Image's."""
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    (folder / "fewstep.json").unlink()
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"shift": shift}))
    with pytest.warns(UserWarning, match=rf"no fewstep.json; .* shift of {shift:g} .* {8 if shift == 3 else 50} steps"):
        model = load(folder)
    assert generate(model, ["a fox"], SamplingParams(height=32, width=32)).nfe == nfe
    turbo = [1, 0.9545, 0.9, 0.8333, 0.75, 0.6429, 0.5, 0.3, 0]
    if shift == 3:
        assert model.sigmas(8) == pytest.approx(turbo, abs=1e-4)
