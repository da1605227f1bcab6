"""Trainings on streams of real latents: with each term that needs them, resumed, and without held-out prompts."""

import json

import pytest
import torch
from process_runs import OPTIONS, weights
from process_runs import distill as distill_by_processes
from real_setup import prompt_of, write_latents

from fewstep import api
from fewstep.config.load import load_recipe
from fewstep.core.method import Shard
from fewstep.errors import UserError
from fewstep.methods.base import DataSetup
from fewstep.methods.dmd.data import dmd_sources
from fewstep.models.fingerprint import recipe_fingerprints
from fewstep.plan.estimate import plan

TERMS = "cfg_augmentation: {}, distribution_matching: {}"
REGULARIZERS = "mean_variance: {weight: 0.1}, mmd: {weight: 0.1}, gan: {weight: 0.1}"


def options(folder, terms=REGULARIZERS, workers=0):
    return [
        f"method.real_source={write_latents(folder)}",
        f"method.real_stream={{shuffle_buffer: 8, num_workers: {workers}}}",
        f"method.terms={{{TERMS}, {terms}}}",
        *(["optim.discriminator={lr: 1.0e-3}"] if "gan" in terms else []),
    ]


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert [name for name, tensor in one.items() if not torch.equal(tensor, other[name])] == []


def test_a_run_on_shards_in_two_parts_equals_one(tiny_folder, tmp_path):
    more = [f"teacher={tiny_folder}", *OPTIONS, *options(tmp_path / "data")]
    for out, steps in (("whole", 3), ("parts", 2), ("parts", 3)):
        api.distill("micro-aligned", tmp_path / out, overrides=[*more, f"train.steps={steps}"])
    assert_equal(weights(tmp_path / "parts"), weights(tmp_path / "whole"))
    lines = [(tmp_path / run / "metrics.jsonl").read_text().splitlines()[-1] for run in ("whole", "parts")]
    first, second = ({**json.loads(line), "seconds": 0} for line in lines)
    assert first == second
    assert {"student/mean_variance", "student/mmd", "student/gan", "discriminator/accuracy"} <= first.keys()


def test_targets_that_are_measured_train_on_prompts_of_a_list(tiny, tiny_folder, tmp_path):
    """The mean-variance term alone needs no real latents in its batches."""
    more = [f"teacher={tiny_folder}", *OPTIONS, *options(tmp_path / "data", "mean_variance: {}")]
    recipe = load_recipe("micro-aligned", more)
    sources = dmd_sources(DataSetup(recipe, tiny, ["a fox", "a bear"], tmp_path / "cache"))
    assert sources["train"](0, Shard()).states is None
    assert set(sources["train"](0, Shard()).texts) <= {"a fox", "a bear"}
    assert sources["real"](0, Shard()).real.shape == (4, 16, 8, 8)


def test_samples_of_validation_and_test_prompts_are_not_trained_on(tiny, tiny_folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(["a fox", "a bear", "a cat"]))
    for name, numbers in (("validation", range(5)), ("test", range(5, 10))):
        (tmp_path / f"{name}.txt").write_text("\n".join(map(prompt_of, numbers)))
    more = [f"teacher={tiny_folder}", *OPTIONS, *options(tmp_path / "data", "gan: {}")]
    more += [f"prompts.source={tmp_path}/prompts.txt"]
    more += [f"prompts.{name}_source={tmp_path}/{name}.txt" for name in ("validation", "test")]
    train = dmd_sources(DataSetup(load_recipe("micro-aligned", more), tiny, ["a fox"], tmp_path / "cache"))["train"]
    texts = [text for position in range(15) for text in train(position, Shard()).texts]
    assert set(texts) == {prompt_of(number) for number in range(10, 40)}


STAGES = """\
kind: stages
name: two
teacher: {teacher}
evaluate: {{enabled: false, validate_every: 0}}
stages:
  - name: first
    method: {{name: dmd, real_source: {shards}, terms: {{cfg_augmentation: {{}}, mmd: {{}}}}}}
    optim: {{student: {{lr: 0.01}}}}
    train: {{steps: 1, batch_size: 4}}
    prompts: {{source: {folder}/prompts.txt, heldout_fraction: 0}}
  - name: second
    method: {{name: dmd, terms: {{cfg_augmentation: {{}}}}}}
    optim: {{student: {{lr: 0.01}}}}
    train: {{steps: 1, batch_size: 4}}
    prompts: {{source: {folder}/prompts.txt, validation_source: {folder}/validation.txt, heldout_fraction: 0}}
"""


def test_a_stage_must_leave_out_what_the_last_one_is_measured_on(tiny_folder, tmp_path):
    shards = write_latents(tmp_path / "data")
    (tmp_path / "prompts.txt").write_text("a fox\na bear\na cat\n")
    (tmp_path / "validation.txt").write_text(prompt_of(0))
    recipe = tmp_path / "two.yaml"
    recipe.write_text(STAGES.format(teacher=tiny_folder, shards=json.dumps(shards), folder=tmp_path))
    with pytest.raises(UserError, match=r"stage first, method.real_source: these samples may have the last stage's"):
        api.distill(recipe, tmp_path / "run")


def test_a_plan_needs_no_shards(tiny_folder, tmp_path):
    more = [f"teacher={tiny_folder}", *OPTIONS, *options(tmp_path / "data", "gan: {}")]
    found = plan(load_recipe("micro-aligned", [*more, f"method.real_source={tmp_path}/absent.tar"]))
    assert found.memory["discriminator weights"] > 0


@pytest.mark.slow
def test_two_processes_resume_exactly(tiny_folder, tmp_path):
    more = options(tmp_path / "data", workers=1)
    for out, steps in (("whole", 4), ("parts", 2), ("parts", 4)):
        distill_by_processes(tiny_folder, tmp_path / out, 2, f"train.steps={steps}", *more)
    assert_equal(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


def test_moved_shards_are_recognized(tiny_folder, tmp_path, monkeypatch):
    (tmp_path / "teacher").mkdir()
    monkeypatch.chdir(tmp_path)
    write_latents(tmp_path / "one")
    (tmp_path / "moved").mkdir()
    (tmp_path / "one").rename(tmp_path / "moved" / "two")
    write_latents(tmp_path / "one")

    def fingerprint(source):
        more = [f"teacher={tiny_folder}", *OPTIONS, *options(tmp_path / "unused", "gan: {}")]
        more += ["method.real_stream={}", f"method.real_source={source}"]
        return recipe_fingerprints(load_recipe("micro-aligned", more)).get("method.real_source")

    assert fingerprint("one") == fingerprint("moved/two") is not None
    write_latents(tmp_path / "one", first=1)
    assert fingerprint("one") != fingerprint("moved/two")
    assert fingerprint("teacher") is None
