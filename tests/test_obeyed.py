"""Configuration is obeyed or refused by name: schedulers, layers, metrics, scorers, and settings without effect."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import fit, tiny_trainer
from torch import Tensor
from typer.testing import CliRunner

import fewstep
from fewstep.cli.main import app
from fewstep.config.load import load_recipe
from fewstep.core.method import UPDATE_METRICS
from fewstep.emoji.dataset import EmojiDataset
from fewstep.errors import UserError
from fewstep.evaluation.applicability import applicable_scores
from fewstep.evaluation.validation import Validator, validation_metrics
from fewstep.jobs import distill
from fewstep.methods.models_setup import check_models
from fewstep.models.adapters import add_adapter
from fewstep.models.components import load_component
from fewstep.models.pipeline import TextToImagePipeline, load
from fewstep.models.quantize import quantize_fp8_
from fewstep.models.zimage.family import ZIMAGE
from fewstep.training.run_dir import RunDir
from fewstep.training.tracking import read_metrics

# --- models ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_folder, tmp_path / "model")


def edit(file: Path, **values: Any) -> Path:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return file


@pytest.mark.parametrize(
    ("key", "value", "only"),
    [
        ("use_dynamic_shifting", True, "false"),
        ("use_karras_sigmas", True, "false"),
        ("use_beta_sigmas", True, "false"),
        ("use_exponential_sigmas", True, "false"),
        ("shift_terminal", 0.1, "null"),
        ("invert_sigmas", True, "false"),
        ("stochastic_sampling", True, "false"),
        ("num_train_timesteps", 500, "1000"),
        ("use_a_later_feature", True, "null"),
    ],
)
def test_scheduler_setting_that_is_not_supported_is_named(folder: Path, key: str, value: Any, only: str) -> None:
    file = edit(folder / "scheduler" / "scheduler_config.json", **{key: value})
    with pytest.raises(UserError) as error:
        load(folder)
    assert str(error.value) == f"{file}: {key} {json.dumps(value)} is not supported; only {only} is"


def test_scheduler_of_another_class_is_named(folder: Path) -> None:
    file = edit(folder / "scheduler" / "scheduler_config.json", _class_name="FlowMatchHeunDiscreteScheduler")
    with pytest.raises(UserError, match=rf"^{file}: _class_name FlowMatchHeunDiscreteScheduler is not supported; use "):
        load(folder)
    edit(file, _class_name="FlowMatchEulerDiscreteScheduler")
    index = edit(folder / "model_index.json", scheduler=["diffusers", "UniPCMultistepScheduler"])
    with pytest.raises(UserError, match=rf"^{index}: _class_name UniPCMultistepScheduler is not supported"):
        load(folder)


@pytest.mark.parametrize("shift", [0, -3.0, float("nan"), float("inf"), "3", None, True])
def test_shift_that_is_no_positive_number_is_named(folder: Path, shift: Any) -> None:
    file = edit(folder / "scheduler" / "scheduler_config.json", shift=shift)
    with pytest.raises(UserError, match=rf"^{file}: shift .* is not a positive number$"):
        load(folder)


def test_settings_that_change_nothing_are_taken(folder: Path) -> None:
    """diffusers reads these only with dynamic shifting; a key of a later version is off while it is false."""
    edit(folder / "scheduler" / "scheduler_config.json", base_shift=9.0, max_shift=9.0, a_later_key=False)
    assert load(folder).sigmas(4) == pytest.approx([1, 0.9, 0.75, 0.5, 0])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"all_patch_size": [4]}, "all_patch_size [4] is not supported; only [2] is"),
        ({"qk_norm": False}, "qk_norm false is not supported; only true is"),
        ({"siglip_feat_dim": 8}, "siglip_feat_dim 8 is not supported; only null is"),
        ({"use_window_attention": True}, "use_window_attention is not supported: ZImageTransformer2DModel has no such"),
    ],
)
def test_transformer_setting_that_is_not_supported_is_named(folder: Path, values: Any, message: str) -> None:
    file = edit(folder / "transformer" / "config.json", **values)
    with pytest.raises(UserError) as error:
        load_component(folder, "transformer")
    assert str(error.value).startswith(f"{file}: {message}")
    with pytest.raises(UserError) as error:
        ZIMAGE.build("transformer", json.loads(file.read_text()))
    assert message in str(error.value)


# --- layers ----------------------------------------------------------------------------------------------------------


def test_every_lora_target_must_match_a_layer(tiny_folder: Path) -> None:
    model = load(tiny_folder)
    there = r"there are .*to_q, to_k, to_v, to_out\.0, w1, "
    with pytest.raises(UserError, match=rf"^target_modules: no linear layer is named 'to_kk'; {there}"):
        add_adapter(model.transformer, "student", 2, target_modules=["to_q", "to_kk"])
    with pytest.raises(UserError, match="no linear layer is named 'o_q'"):  # whole parts of names, as peft matches them
        add_adapter(model.transformer, "student", 2, target_modules=["o_q"])
    with pytest.raises(UserError, match="no linear layer is named 'to_out'"):  # a list of layers, not a layer
        add_adapter(model.transformer, "student", 2, target_modules=["to_out", "to_q"])
    recipe = load_recipe("micro-aligned", ["models.train=lora", "models.target_modules=[to_q,to_kk]"])
    with pytest.raises(UserError, match=r"^models\.target_modules: no linear layer is named 'to_kk'"):
        check_models(recipe, model)  # type: ignore[arg-type]
    add_adapter(model.transformer, "student", 2, target_modules=["attention.to_q", "to_out.0"])
    add_adapter(model.transformer, "fake_score", 2, target_modules=["to_q", "w1"])


def test_lora_target_is_refused_before_trajectories_are_made(tiny_folder: Path, tmp_path: Path) -> None:
    more = ["models.train=lora", "models.target_modules=[to_q,to_kk]", "trajectory.num_trajectories=1000000"]
    recipe = load_recipe("micro-aligned", [f"teacher={tiny_folder}", *more])
    with RunDir(tmp_path, recipe) as run, pytest.raises(UserError, match="no linear layer is named 'to_kk'"):
        distill(recipe, run)  # type: ignore[arg-type]


def test_every_quantized_name_must_match_a_layer(tiny_folder: Path) -> None:
    transformer = load(tiny_folder).transformer
    with pytest.raises(UserError, match="quantizable_modules: no linear layer is named 'w4'; there are "):
        quantize_fp8_(transformer, ("w1", "w4"))
    quantize_fp8_(transformer, ("w1",))
    quantize_fp8_(transformer, ("w1", "w2"))  # again: w1 stays as it is


# --- metrics and scorers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("student/los", "train.keep_best.metric: there is no 'student/los'; there are .*student/loss, "),
        ("loss", "there is no 'loss'; there are "),
        ("discriminator/loss", "there is no 'discriminator/loss'"),
        ("student/gan", "there is no 'student/gan'"),
        ("student/dm_abs_2", "there is no 'student/dm_abs_2'"),
        ("val/object_acc", "train.keep_best.metric val/object_acc: never measured; set evaluate.validate_every"),
    ],
)
@pytest.mark.parametrize("recipe", ["micro-decoupled", "micro-long"])
def test_best_checkpoint_by_an_unknown_metric_is_refused(recipe: str, metric: str, message: str) -> None:
    prefix = "stages.1." if recipe == "micro-long" else ""
    words = [f"{prefix}train.keep_best={{metric: {metric}}}", "evaluate.validate_every=0"]
    with pytest.raises(UserError, match=message) as error:
        load_recipe(recipe, words)
    assert "\n" not in str(error.value)


def test_metrics_of_a_recipe_are_those_that_its_training_logs(tiny_folder: Path, tmp_path: Path) -> None:
    """Every term of method dmd, from the first step on."""
    terms = (
        "{cfg_augmentation: {}, distribution_matching: {scales: {2: 0.5}}, gan: {}, mean_variance: {}, mmd: {}, "
        "trajectory_mse: {}}"
    )
    optim = "{student: {lr: 1.0e-4}, fake_score: {lr: 1.0e-4}, discriminator: {lr: 1.0e-4}}"
    more = [
        *(f"method.terms={terms}", f"optim={optim}", "method.fake_score_updates=1", "method.fake_score_start=0"),
        *("train={steps: 1, batch_size: 2, log_every: 1}", "evaluate={enabled: false}", "student={steps: 2}"),
        "trajectory={num_trajectories: 2, teacher_steps_per_student_step: 1}",
    ]
    recipe = load_recipe("micro-aligned", [f"teacher={tiny_folder}", *more])
    with RunDir(tmp_path, recipe) as run:
        distill(recipe, run)  # type: ignore[arg-type]
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    parts = recipe.method.trainable_parts()  # type: ignore[attr-defined]
    declared = recipe.method.metric_names(recipe) | {f"{p}/{n}" for p in parts for n in UPDATE_METRICS}  # type: ignore[attr-defined]
    assert set(line) - {"step", "seconds"} == declared


def test_best_checkpoint_by_a_score_that_validation_lacks_is_refused(tmp_path: Path) -> None:
    """The emoji scores do not apply to prompts of a file."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"a photograph of house number {i}\n" for i in range(100)))
    more = ["evaluate.validate_every=5", "evaluate.scorers=null", "train.keep_best={metric: val/object_acc}"]
    with pytest.raises(UserError, match=r"no 'val/object_acc' with .*; there are val/saturation, val/hf_energy"):
        fewstep.distill("micro-aligned", tmp_path / "run", overrides=[*more, f"prompts.source={prompts}"])
    assert not (tmp_path / "run").exists()


def test_validation_metrics_are_those_of_the_validator(tiny: TextToImagePipeline) -> None:
    for prompts in (["a noto emoji of a red apple on a blue background"], ["a photograph of a house"]):
        names = validation_metrics(prompts, ["emoji"])
        assert set(names) == set(Validator(prompts, ["emoji"])(tiny, tiny)())
    assert len(names) == 2


def test_metric_that_no_line_has_is_reported_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where the names are not known beforehand, as those of a method in a plug-in."""
    fit(tiny_trainer(tmp_path, keep_best={"metric": "first/los"}))
    shown = capsys.readouterr()
    line = "train.keep_best.metric first/los: not logged at step 4; there are first/loss, "
    assert (shown.out + shown.err).count(line) == 1


def test_named_scorer_that_applies_to_no_prompt_is_refused(tiny: TextToImagePipeline, tmp_path: Path) -> None:
    prompts = [f"a photograph of house number {i}" for i in range(40)]
    message = r"scorer emoji: it applies to none of the \d+ prompts; leave it out"
    with pytest.raises(UserError, match=message):
        fewstep.evaluate(tiny, prompts, scorers=["emoji"])
    file = tmp_path / "prompts.txt"
    file.write_text("".join(f"{prompt}\n" for prompt in prompts))
    words = ["evaluate.scorers=[emoji]", f"prompts.source={file}", "prompts.heldout_fraction=0.2"]
    with pytest.raises(UserError, match=message):
        fewstep.distill("micro-aligned", tmp_path / "run", overrides=words)


def test_scores_are_found_among_many_prompts() -> None:
    class OnlyLast:
        name = "last"

        def score(self, images: Tensor, prompts: list[str]) -> dict[str, Tensor]:
            assert images.shape[0] == len(prompts)
            return {"last": torch.tensor([1.0 if prompt == "last" else float("nan") for prompt in prompts])}

    assert applicable_scores(OnlyLast(), ["first"] * 100 + ["last"]) == ["last"]
    assert applicable_scores(OnlyLast(), ["first"] * 100) == []


# --- settings without effect -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("models.target_modules=[to_q]", "models: target_modules: no effect on full copies; set models.train: lora"),
        ("models.rank=4", "models: rank: no effect on full copies; set models.train: lora"),
        ("models.lora_alpha=8", "models: lora_alpha: no effect on full copies"),
        ("student.eta=0.5", "student: eta: no effect on the euler sampler; set student.sampler: sde"),
        ("optim.fake_score.min_lr_ratio=0.5", "optim.fake_score.min_lr_ratio: no effect on a constant rate"),
        ("method.real_source=emoji", "method.real_source emoji: no term needs real latents; leave it out"),
        ("trajectory.cache=runs/cache", "trajectory.cache: no term uses the teacher's trajectories; leave it out"),
        (
            "method.terms.cfg_augmentation.weight={kind: piecewise, values: {0: 1, 500: 2}}",
            "method.terms.cfg_augmentation.weight changes at step 500, after the last of 400",
        ),
    ],
)
def test_setting_without_effect_is_refused(override: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        load_recipe("micro-decoupled", [override])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_dataset_with_fewer_objects_than_asked_for_is_refused() -> None:
    everything = len(EmojiDataset.load().objects)
    with pytest.raises(UserError, match=f"num_objects {everything + 1}: the dataset has {everything} objects"):
        EmojiDataset.load(everything + 1)


def test_option_of_convert_without_effect_is_refused(tmp_path: Path) -> None:
    words = ["convert", "micro", "--out", str(tmp_path / "out"), "--components-from", "micro"]
    refused = CliRunner().invoke(app, words)
    assert (refused.exit_code, refused.stderr.count("\n")) == (1, 1)
    assert refused.stderr.startswith("error: --components-from: no effect on micro, which is not a single file")
