"""As many steps as a prompt needs: labels, the regression, `fewstep steps train`, `generate --steps auto`."""

import shutil
from collections import Counter
from dataclasses import replace

import openai
import pytest
import torch
from serve_setup import make_service, open_image, pixels, running
from typer.testing import CliRunner

import fewstep
from fewstep import api
from fewstep.cli.main import app
from fewstep.config.load import load_recipe
from fewstep.core.method import Shard
from fewstep.errors import UserError
from fewstep.evaluation.step_labels import fixed_quality, quality, seed_noise, shuffled_quality, step_labels
from fewstep.evaluation.step_training import train_on_features
from fewstep.inference.generate import generate
from fewstep.inference.image_metadata import read_metadata
from fewstep.inference.params import SamplingParams
from fewstep.inference.step_chooser import STEP_CHOOSER, StepChooser, fit, pooled, prompt_features
from fewstep.methods.base import DataSetup
from fewstep.methods.dmd.data import dmd_sources
from fewstep.models.pipeline import load

COUNTS = (1, 2, 4)
PROMPTS = ["a fox", "a red bear on a blue background", "a dog", "一只狐狸"]


def succeed(*words):
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_labels_are_the_least_counts_within_the_noise():
    means = torch.tensor([[0.0, 0.95, 1.0], [1.0, 1.0, 1.0], [0.0, 0.0, 1.0], [1.0, 0.0, 1.0], [2.0, 1.0, 1.0]])
    spread = torch.tensor([-0.1, 0.1])
    scores = means[:, :, None] + spread
    noise = seed_noise(scores)
    assert noise == pytest.approx((0.02 / 2) ** 0.5)  # variance .02 of each prompt, of a mean over two seeds
    assert step_labels(scores, noise).tolist() == [1, 0, 2, 2, 0]
    assert quality(scores, torch.tensor([1, 0, 2, 2, 0])) == pytest.approx((0.95 + 1 + 1 + 1 + 2) / 5)


def test_baselines_of_the_same_cost():
    scores = torch.tensor([[0.0, 1.0, 2.0], [0.0, 3.0, 4.0]])[:, :, None].repeat(1, 1, 2)
    assert fixed_quality(scores, COUNTS, 2.0) == pytest.approx(2.0)
    assert fixed_quality(scores, COUNTS, 3.0) == pytest.approx(2.5)
    assert shuffled_quality(scores, torch.tensor([0, 2])) == pytest.approx(1.5)


def test_the_regression_finds_the_direction():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(600, 8, generator=generator)
    need = features[:, 0] + 0.1 * torch.randn(600, generator=generator)
    labels = (need > -0.5).long() + (need > 0.5).long()
    found = fit(features, labels, COUNTS, 1e-3, "")
    assert abs(float(found.weights[0])) > 10 * float(found.weights[1:].abs().max())
    assert found.offsets.tolist() == sorted(found.offsets.tolist())
    chosen = torch.tensor([COUNTS.index(count) for count in found.choose(features)])
    assert (chosen == labels).float().mean() > 0.9


@pytest.mark.parametrize("told", [True, False])
def test_choosing_pays_only_where_prompts_tell(told):
    """Half of the prompts need 4 steps, the others 1; features tell which, or nothing."""
    generator = torch.Generator().manual_seed(1)
    hard = torch.rand(800, generator=generator) < 0.5
    features = torch.randn(800, 6, generator=generator)
    features[:, 2] += 3.0 * hard * told
    means = torch.where(hard[:, None], torch.tensor([0.0, 0.5, 1.0]), torch.tensor([1.0, 1.0, 1.0]))
    scores = means[:, :, None] + 0.05 * torch.randn(800, 3, 2, generator=generator)
    chooser, study = train_on_features(features, scores, COUNTS, "")
    cheaper, spent = train_on_features(features, scores, COUNTS, "", budget=1.8)
    assert spent.steps == pytest.approx(1.8, abs=0.3)
    assert spent.pays is told
    assert cheaper.threshold >= chooser.threshold
    if told:
        assert study.pays
        assert study.steps < 3
        assert study.score > 0.97
        assert study.same_cost < 0.9
    else:
        assert abs(study.score - study.shuffled) < 0.05
        assert study.score < study.same_cost + 0.05
    assert sum(study.labels) == 600
    assert chooser.counts == COUNTS


@pytest.fixture
def model(tiny_folder, tmp_path):
    """A model whose chooser gives long prompts more steps."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    pipeline = load(folder, "cpu")
    features = prompt_features(pipeline.encoder, PROMPTS)
    fit(features, torch.tensor([0, 2, 1, 0]), COUNTS, 1e-6, _template(pipeline)).save(folder)
    return folder


def _template(pipeline):
    from fewstep.data.trajectories import template_hash

    return template_hash(pipeline.encoder)


def test_pooled_features_ignore_the_padding(tiny):
    whole = pooled(tiny.encode(PROMPTS))
    for row, prompt in enumerate(PROMPTS):
        torch.testing.assert_close(whole[row : row + 1], pooled(tiny.encode([prompt])))


def test_images_are_those_of_the_chosen_steps(model):
    pipeline = load(model, "cpu")
    steps = [1, 4, 2, 1]
    reported = []
    made = generate(
        pipeline, PROMPTS, SamplingParams(auto_steps=True, seed=5), lambda step: reported.append(tuple(step.images))
    )
    for row, (prompt, count) in enumerate(zip(PROMPTS, steps, strict=True)):
        alone = generate(pipeline, [prompt], SamplingParams(steps=count, seed=5 + row))
        assert torch.equal(made.images[row], alone.images[0])
    guided = 2  # passes of a step
    assert made.nfe == guided * sum(steps) / 4
    assert reported == [(0, 3), (2,), (2,), (1,), (1,), (1,), (1,)]
    again = fewstep.generate(model, PROMPTS, steps="auto", seed=5, device="cpu")
    assert torch.equal(again.images, made.images)


def test_the_file_records_the_chosen_steps(model, tmp_path):
    words = ("generate", model, *PROMPTS, "--steps", "auto", "--seed", 3, "-o", f"{tmp_path}/out/")
    assert "4 images, NFE 4," in succeed(*words)
    files = sorted((tmp_path / "out").glob("*.png"))
    assert [read_metadata(file).params.steps for file in files] == [1, 4, 2, 1]
    succeed("generate", "--from", files[1], "-o", tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == files[1].read_bytes()


def test_the_server_draws_as_many_steps_as_a_prompt_needs(model):
    pipeline = load(model, "cpu")
    with running(make_service(pipeline)) as server:
        for prompt, count in zip(PROMPTS, (1, 4, 2, 1), strict=True):
            made = server.client.images.generate(prompt=prompt, extra_body={"seed": 7, "steps": "auto"})
            assert made.steps == count
            expected = generate(pipeline, [prompt], SamplingParams(seed=7, steps=count)).images[0]
            assert torch.equal(pixels(open_image(made.data[0].b64_json)), expected)
    pipeline.folder = None
    with (
        running(make_service(pipeline)) as server,
        pytest.raises(openai.BadRequestError, match="steps auto: this model"),
    ):
        server.client.images.generate(prompt="a fox", extra_body={"steps": "auto"})


def test_other_choosers_are_refused(model, tiny):
    assert StepChooser.load(model).counts == COUNTS
    with pytest.raises(UserError, match=r"this model has no steps.safetensors; make it with fewstep steps train"):
        generate(tiny, PROMPTS, SamplingParams(auto_steps=True))
    pipeline = load(model, "cpu")
    pipeline.generation_config.system_prompt = "other"
    stranger = StepChooser.load(model)
    fit(torch.randn(8, 3), torch.arange(8) % 3, COUNTS, 1.0, stranger.made_by).save(model)
    with pytest.raises(UserError, match="is for another text encoder or prompt template"):
        generate(pipeline, PROMPTS, SamplingParams(auto_steps=True))
    (model / STEP_CHOOSER).write_bytes(b"none")
    with pytest.raises(UserError, match="cannot be read"):
        StepChooser.load(model)


def test_training_writes_a_chooser(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, prompts = tmp_path / "model", tmp_path / "prompts.txt"
    shutil.copytree(tiny_folder, folder)
    prompts.write_text("\n".join(f"a noto emoji of a fox number {number}" for number in range(60)))
    code = "def score(images, prompts):\n    return images.mean(dim=(1, 2, 3))\n"
    (tmp_path / "brightness_of_steps.py").write_text(code)
    words = ("steps", "train", folder, "--prompts", prompts, "--counts", "1,2", "--num-prompts", 40)
    output = succeed(*words, "--reward", "python:brightness_of_steps:score")
    assert "steps auto" in output
    assert "at random" in output
    assert StepChooser.load(folder).counts == (1, 2)
    assert "NFE" in succeed("generate", folder, *PROMPTS, "--steps", "auto", "-o", tmp_path / "a.png")


def test_a_distillation_draws_prompts_by_the_steps_that_they_need(model, tmp_path):
    """Batches of 4 steps have the prompt that needs 4 more often; a run with such batches trains."""
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS))
    recipe = load_recipe(
        "micro-turbo",
        [
            *(f"teacher={model}", f"prompts.source={file}", "prompts.heldout_fraction=0", "train.batch_size=4"),
            *("student={steps: 4, step_counts: [1, 2, 4]}", f"student.step_chooser={model}", "train.steps=2"),
            *("evaluate={enabled: false}", "train.sample_every=0", "train.precision=fp32"),
        ],
    )
    pipeline = load(model, "cpu")
    source = dmd_sources(DataSetup(recipe, pipeline, PROMPTS, tmp_path / "cache"))["train"]
    counts = {1: Counter(), 2: Counter(), 4: Counter()}
    for position in range(300):
        batch = source(position, Shard())
        torch.testing.assert_close(batch.prompts[:1].features, pipeline.encode(batch.texts[:1]).features)
        counts[batch.steps].update(batch.texts)
    hard = {count: drawn[PROMPTS[1]] / drawn.total() for count, drawn in counts.items()}
    assert hard == pytest.approx({1: 0.25, 2: 0.4, 4: 1 / 1.75}, abs=0.07)
    assert api.distill(recipe, tmp_path / "run").student.is_dir()

    def opened(name="micro-turbo", *more):
        more = [f"teacher={model}", f"student.step_chooser={model}", *more]
        return dmd_sources(DataSetup(load_recipe(name, more), pipeline, PROMPTS, tmp_path / "cache"))

    with pytest.raises(UserError, match=r"chooses among 1, 2, 4 steps, .* fewstep steps train --counts 2,4"):
        opened("micro-turbo", "student.step_counts=[2, 4]")
    with pytest.raises(UserError, match="a term needs real latents of each prompt"):
        opened("micro-aligned", "student.step_counts=[1, 2, 4]")
    chooser = StepChooser.load(model)
    replace(chooser, made_by="other").save(model)
    with pytest.raises(UserError, match="is for another text encoder"):
        opened("micro-turbo", "student.step_counts=[1, 2, 4]")
    (model / STEP_CHOOSER).unlink()
    with pytest.raises(UserError, match=r"^student.step_chooser: .* has no steps.safetensors"):
        opened("micro-turbo", "student.step_counts=[1, 2, 4]")
