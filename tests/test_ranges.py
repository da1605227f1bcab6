"""Numbers that reach torch: each has its range, checked before any work, and seeds wrap around after the last one."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import fewstep
from fewstep.cli.main import app
from fewstep.config.load import load_recipe
from fewstep.core.schedules import Constant, Piecewise, Ramp
from fewstep.core.seeds import MAX_SEED, generator, image_seed
from fewstep.data.trajectories import Index
from fewstep.errors import UserError
from fewstep.inference.params import SamplingParams, parse_params
from fewstep.methods.dmd.config import first_gap, first_step
from fewstep.models.generation_config import load_generation_config
from fewstep.models.pipeline import TextToImagePipeline
from fewstep.plan.gpus import parse_gpu

PROMPTS = ["a fox", "a dog"]


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def test_seeds_wrap_around_after_the_largest() -> None:
    assert [image_seed(MAX_SEED, i) for i in range(3)] == [MAX_SEED, 0, 1]
    torch.Generator().manual_seed(MAX_SEED)
    with pytest.raises((RuntimeError, ValueError, OverflowError)):
        torch.Generator().manual_seed(MAX_SEED + 1)
    generator("noise", MAX_SEED, 0)
    assert Index({}, samples=4, shard_size=2, first_seed=MAX_SEED - 1).seeds(range(4)) == [MAX_SEED - 1, MAX_SEED, 0, 1]


@pytest.mark.parametrize("sampler", ["euler", "sde"])
def test_images_after_the_largest_seed_are_those_of_the_first_seeds(tiny: TextToImagePipeline, sampler: str) -> None:
    options = {"steps": 2, "sampler": sampler, "guidance_scale": 0}
    pair = fewstep.generate(tiny, PROMPTS, seed=MAX_SEED, **options).images
    second = fewstep.generate(tiny, PROMPTS[1], seed=0, **options).images
    assert (pair[1].int() - second[0].int()).abs().max() <= 1  # rounding: one batch has two rows
    assert (pair[1].int() - pair[0].int()).abs().max() > 20


def test_evaluation_from_the_largest_seed_runs(tiny: TextToImagePipeline) -> None:
    found = fewstep.evaluate(tiny, PROMPTS, scorers=[], seed=MAX_SEED, many_steps=1, diversity_seeds=2)
    assert found.run["first_seed"] == MAX_SEED


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"seed": MAX_SEED + 1}, f"seed: input should be less than or equal to {MAX_SEED} "),
        ({"seed": -1}, "seed: input should be greater than or equal to 0 "),
        ({"seeds": [0, 10**30]}, f"seeds.1: input should be less than or equal to {MAX_SEED} "),
        ({"steps": 10**12}, "steps: input should be less than or equal to 10000 "),
        ({"height": 10**9}, "height: input should be less than or equal to 16384 "),
        ({"width": 2**70}, "width: input should be less than or equal to 16384 "),
        ({"guidance_scale": 1e300}, "guidance_scale: input should be less than or equal to 1000 "),
        ({"guidance_scale": float("inf")}, "guidance_scale: input should be a finite number "),
        ({"batch_size": 2**64}, "batch_size: input should be less than or equal to 65536 "),
        ({"adapters": {"style": float("nan")}}, "adapters.style: input should be a finite number "),
    ],
)
def test_sampling_option_out_of_range_is_one_line(options: dict[str, object], line: str) -> None:
    with pytest.raises(UserError) as error:
        parse_params(options)
    assert str(error.value).startswith(line)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("recipe", "override", "line"),
    [
        ("micro-aligned", f"train.seed={10**20}", f"train.seed: input should be less than or equal to {MAX_SEED} "),
        ("micro-cache", f"first_seed={MAX_SEED + 1}", f"first_seed: input should be less than or equal to {MAX_SEED} "),
        ("micro-teacher", "train.seed=-1", "train.seed: input should be greater than or equal to 0 "),
        ("micro-aligned", f"train.steps={10**30}", "train.steps: input should be less than or equal to 1000000000 "),
        (
            "micro-aligned",
            f"train.batch_size={2**40}",
            "train.batch_size: input should be less than or equal to 65536 ",
        ),
        (
            "micro-aligned",
            f"train.num_threads={2**33}",
            "train.num_threads: input should be less than or equal to 4096 ",
        ),
        ("micro-aligned", f"resolution={2**31}", "resolution: input should be less than or equal to 16384 "),
        ("micro-aligned", f"models.rank={2**63}", "models.rank: input should be less than or equal to 65536 "),
        ("micro-aligned", "optim.student.lr=.nan", "optim.student.lr: input should be a finite number "),
        ("micro-aligned", "method.renoise.sigma_min=.99", "method.renoise: sigma_min 0.99 is not below sigma_max 0.98"),
        (
            "micro-aligned",
            f"method.fake_score_updates={10**9}",
            "method.fake_score_updates: input should be less than ",
        ),
        ("micro-aligned", "train.max_minutes=.inf", "train.max_minutes: input should be a finite number "),
        ("micro-aligned", f"train.seed={'9' * 5000}", f"-s train.seed={'9' * 5000}: the value is not valid YAML"),
        ("micro-aligned", "train.steps=2024-13-45", "-s train.steps=2024-13-45: the value is not valid YAML"),
        ("micro-vae", "model.norm_num_groups=7", "model: block_out_channels 32 is not a multiple of norm_num_groups"),
        ("micro-teacher", "model.n_heads=5", "model: dim 192 is not n_heads 5 times the sum of axes_dims, 48"),
        ("micro-teacher", "model.axes_dims=[15,16,17]", "model.axes_dims.0: input should be a multiple of 2 "),
        ("micro-teacher", "shift=1e300", "shift: input should be less than or equal to 1000 "),
        ("classifier", "base_channels=13", "base_channels: input should be a multiple of 4 "),
    ],
)
def test_recipe_number_out_of_range_is_one_line(recipe: str, override: str, line: str) -> None:
    with pytest.raises(UserError) as error:
        load_recipe(recipe, [override])
    assert str(error.value).removeprefix(f"{recipe}: ").startswith(line)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("seed", [str(MAX_SEED + 1), "-1"])
@pytest.mark.parametrize("command", ["generate", "evaluate"])
def test_commands_refuse_a_seed_out_of_range_in_one_line(command: str, seed: str, tmp_path: Path) -> None:
    words = {"generate": ["a fox", "-o", tmp_path / "x.png"], "evaluate": ["--out", tmp_path / "x"]}[command]
    refused = run(command, "micro", *words, "--seed", seed)
    assert refused.exit_code == 1
    assert refused.stderr.startswith("error: seed: input should be ")
    assert refused.stderr.count("\n") == 1


def test_evaluation_refuses_numbers_out_of_range_before_any_image(tiny: TextToImagePipeline) -> None:
    for options, message in (
        ({"seed": 2**64}, "seed: input should be"),
        ({"many_steps": 10**9}, "steps: input should be"),
        ({"diversity_prompts": -3}, "diversity_prompts: at least 0, got -3"),
    ):
        with pytest.raises(UserError, match=message):
            fewstep.evaluate(tiny, PROMPTS, scorers=[], **options)


@pytest.mark.parametrize("text", ["nan", "inf", "-5GB", "0", "1e400GB"])
def test_plan_refuses_a_gpu_without_a_size(text: str) -> None:
    with pytest.raises(UserError, match="give a size such as 24GB"):
        parse_gpu(text)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"guidance_scale": float("nan")}, "guidance_scale: input should be a finite number"),
        ({"steps": 10**12}, "steps: input should be less than or equal to 10000"),
        ({"height": 0}, "height: input should be greater than or equal to 1"),
        ({"steps": 2, "sigmas": [1.0, float("nan"), 0.0]}, "sigmas.1: input should be a finite number"),
        ({"steps": 2, "sigmas": [1.0, 7.0, 0.0]}, "expected noise levels that descend from 1 to 0"),
        ({"steps": 4, "sigmas": [1.0, 0.5, 0.0]}, "sigmas: 3 levels with steps 4; expected one more than steps"),
    ],
)
def test_generation_config_out_of_range_is_named(
    tiny_folder: Path, tmp_path: Path, values: dict[str, object], message: str
) -> None:
    file = tmp_path / "fewstep.json"
    file.write_text(json.dumps(json.loads((tiny_folder / "fewstep.json").read_text()) | values))
    with pytest.raises(UserError) as error:
        load_generation_config(tmp_path)
    assert str(file) in str(error.value)
    assert message in str(error.value)


def test_latents_that_are_not_finite_are_reported(tiny_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    broken = fewstep.load(folder)
    broken.transformer.all_final_layer["2-1"].linear.bias.fill_(float("nan"))
    with pytest.warns(UserWarning, match="image 0: its latents are not finite, as those of 1 more; lower guidance"):
        fewstep.generate(broken, PROMPTS, steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fewstep.generate(folder, PROMPTS, steps=1, guidance_scale=1)


@pytest.mark.parametrize(
    "error", [RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), MemoryError()]
)
def test_lack_of_memory_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("fewstep.inference.generate.initial_noise", fail)
    failed = run("generate", "micro", "a fox", "-o", tmp_path / "x.png")
    assert (failed.exit_code, failed.stderr.count("\n")) == (1, 1)
    assert failed.stderr.startswith("error: out of memory; take smaller batches")
    monkeypatch.setattr("fewstep.inference.generate.initial_noise", lambda *_: 1 / 0)
    assert isinstance(run("generate", "micro", "a fox", "-o", tmp_path / "x.png").exception, ZeroDivisionError)


def test_sampling_parameters_at_their_bounds_are_taken() -> None:
    given = SamplingParams(seed=MAX_SEED, steps=10_000, height=16_384, guidance_scale=1000, batch_size=65_536)
    assert given.seed == MAX_SEED


def test_weights_are_searched_for_gaps_at_their_breakpoints() -> None:
    """Step by step, a recipe of a billion steps would take minutes to check."""
    steps = 10**9
    late, early = Ramp(0, 1, steps // 2, steps), Piecewise({0: 1, 10: 0, 20: 2})
    assert first_step(late, steps) == steps // 2 + 1
    assert first_step(Constant(0), steps) == steps
    assert first_gap([early], steps) == 10
    assert first_gap([early, Ramp(1, 0, 5, 21)], steps) is None
    assert first_gap([Piecewise({0: 0, 7: 1}), Ramp(1, 0, 0, 7)], steps) is None
    for weights in ([early], [Ramp(0, 1, 3, 9, cosine=True)], [early, Ramp(1, 0, 0, 15)], [Ramp(1, 0, 2, 8)]):
        start = min(next((s for s in range(30) if weight(s) > 0), 30) for weight in weights)
        gap = next((s for s in range(start, 30) if not any(weight(s) > 0 for weight in weights)), None)
        assert first_gap(weights, 30) == gap
