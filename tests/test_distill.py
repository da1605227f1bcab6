"""A whole distillation on a tiny model: exact resume, mistakes, and a student that diffusers opens."""

import copy
import json

import pytest
import torch
from diffusers import ZImagePipeline
from safetensors.torch import load_file

from fewstep import api
from fewstep.config.load import load_recipe
from fewstep.core.method import Shard
from fewstep.core.schedules import Constant
from fewstep.data.batch import DistillBatch
from fewstep.data.prompt_batches import prompt_batches
from fewstep.data.prompts import open_prompts
from fewstep.data.teacher_trajectories import make_cache
from fewstep.emoji.classifier import EmojiClassifier
from fewstep.errors import UserError
from fewstep.evaluation.metrics import frechet_distance
from fewstep.inference.generate import generate
from fewstep.inference.params import SamplingParams
from fewstep.methods.dmd.method import DMD, WeightedTerm
from fewstep.methods.dmd.renoise import Renoise
from fewstep.methods.dmd.student_sampler import StudentSampler
from fewstep.methods.dmd.terms.cfg_augmentation import CFGAugmentation
from fewstep.models.pipeline import load
from fewstep.models.zimage.denoiser import ZImageDenoiser

SHORT = [
    *("train.batch_size=2", "train.log_every=1", "train.save_every=2", "train.sample_every=0", "train.precision=fp32"),
    *("method.terms={cfg_augmentation: {}, distribution_matching: {}}", "method.fake_score_start=0"),
    *("method.fake_score_updates=2", "evaluate.enabled=false", "optim.student.lr_schedule=constant"),
    "evaluate.validate_every=0",
    "optim.student.min_lr_ratio=0",
]


def distill(folder, out, *more):
    return api.distill("micro-aligned", out, overrides=[f"teacher={folder}", *SHORT, *more])


def weights(run):
    files = sorted(run.glob("student/*/*.safetensors"))
    assert len(files) == 3
    return {f"{file.parent.name}/{name}": tensor for file in files for name, tensor in load_file(file).items()}


def test_resume_is_bit_exact_and_the_student_is_a_pipeline(tiny, tiny_folder, tmp_path):
    distill(tiny_folder, tmp_path / "whole", "train.steps=4")
    distill(tiny_folder, tmp_path / "parts", "train.steps=2")
    distill(tiny_folder, tmp_path / "parts", "train.steps=4")
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, parts[name]), name

    # the transformer alone was trained
    moved = {name.split("/")[0] for name, tensor in weights(tmp_path / "whole").items() if changed(name, tensor, tiny)}
    assert moved == {"transformer"}
    card = load(tmp_path / "whole" / "student").generation_config
    assert (card.steps, card.guidance_scale, card.guidance_distilled) == (4, 0.0, True)
    assert card.sigmas == pytest.approx([1.0, 0.9, 0.75, 0.5, 0.0])
    assert card.teacher == str(tiny_folder)
    assert ZImagePipeline.from_pretrained(tmp_path / "whole" / "student").transformer is not None

    lines = [json.loads(line) for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert {"student/loss", "fake_score/loss", "student/cfg_aug_abs", "student/dm_abs", "student/ca_dm_cosine"} <= set(
        lines[0]
    )
    assert 0.1 < lines[0]["student/x0_std_ratio"] < 2  # the student starts as the teacher
    for name in ("recipe.yaml", "checkpoints", "student"):
        assert (tmp_path / "whole" / name).exists()


def test_weight_schedules_order_the_training(tiny_folder, tmp_path):
    """As in the bundled recipe: trajectory MSE alone, the fake score from the second step on, then CA and DM."""
    late = "{weight: {kind: piecewise, values: {0: 0, 50%: 1}}}"
    terms = f"{{cfg_augmentation: {late}, distribution_matching: {late}, trajectory_mse: {{}}}}"
    more = (f"method.terms={terms}", "method.fake_score_start=25%", "trajectory.num_trajectories=4", "train.steps=4")
    distill(tiny_folder, tmp_path / "run", *more)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert ["student/cfg_aug_abs" in line for line in lines] == [False, False, True, True]
    assert ["fake_score/loss" in line for line in lines] == [False, True, True, True]


@pytest.mark.slow
@pytest.mark.parametrize("train", ["full", "lora"])
def test_compiled_run_trains_equally(tiny_folder, tmp_path, train):
    for name, more in (("eager", ()), ("compiled", ("models.compile=true", "models.gradient_checkpointing=true"))):
        distill(tiny_folder, tmp_path / name, "train.steps=2", f"models.train={train}", *more)
    eager, compiled = weights(tmp_path / "eager"), weights(tmp_path / "compiled")
    for name, tensor in eager.items():
        torch.testing.assert_close(tensor, compiled[name], atol=1e-3, rtol=1e-3)


def changed(name, tensor, model):
    part, _, key = name.partition("/")
    return not torch.equal(tensor, getattr(model, part).state_dict()[key])


@pytest.mark.parametrize(
    "more",
    [
        pytest.param(("method.renoise.schedule=shared",), marks=pytest.mark.slow),
        ("method.renoise.schedule=constrained", "student.sampler=sde", "student.steps=2"),
        (
            *("method.renoise.schedule=full", "method.terms.distribution_matching=null", "optim.fake_score=null"),
            "student.timestep_sampling=continuous",
        ),
        pytest.param(
            ("method.terms.cfg_augmentation=null", "method.fake_score_ema_to_student=0.01", "student.steps=1"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_every_option_runs(tiny_folder, tmp_path, more):
    made = distill(tiny_folder, tmp_path / "run", "train.steps=1", *more)
    student = load(made.student)
    assert api.generate(student, "a fox").images.shape == (1, 64, 64, 3)


@pytest.mark.slow
def test_resolution_is_that_of_training_and_of_the_student(tiny_folder, tmp_path):
    more = ("train.steps=2", "method.terms.trajectory_mse={}", "trajectory.num_trajectories=4", "resolution=32")
    made = distill(tiny_folder, tmp_path / "run", *more)
    assert (load(made.student).generation_config.height, load(made.student).generation_config.width) == (32, 32)
    assert generate(load(made.student), ["a fox"]).images.shape == (1, 32, 32, 3)
    cached = load_file(next((tmp_path / "run" / "cache").glob("*.safetensors")))
    assert cached["states"].shape[-2:] == (4, 4)
    where = f"trajectory.cache={tmp_path / 'large'}"
    for size in ("64", "32"):
        overrides = ["num_trajectories=4", "teacher_steps_per_student_step=4", f"teacher={tiny_folder}"]
        overrides += [f"resolution={size}"]
        make_cache(load_recipe("micro-cache", overrides), tmp_path / ("large" if size == "64" else "small"))
    with pytest.raises(UserError, match="latent"):
        distill(tiny_folder, tmp_path / "other", *more, where)
    distill(tiny_folder, tmp_path / "same", *more, where.replace("large", "small"))


def test_prompts_from_a_file(tiny_folder, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a fox\n一只狐狸\n" * 20, encoding="utf-8")
    made = distill(
        tiny_folder,
        tmp_path / "run",
        "train.steps=1",
        "train.sample_every=1",
        f"prompts.source={file}",
        "evaluate.validate_every=0",
    )
    assert made.student.is_dir()
    assert (tmp_path / "run" / "previews" / "step_000001.png").is_file()


def test_mistakes(tiny_folder, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    for more, message in [
        (("method.terms={}", "optim.fake_score=null"), "no term has a weight"),
        (("student.timesteps=[0.9, 0.5]", "student.steps=2"), "levels that descend from 1"),
        (("student.timesteps=[1, 0.5]",), "expected 4 levels"),
        ((f"prompts.source={empty}",), "no prompts in it"),
        (("teacher=nowhere",), "no model found"),
    ]:
        with pytest.raises(UserError, match=message):
            distill(tiny_folder, tmp_path / "run", *more)
    distill(
        tiny_folder, tmp_path / "run", "train.steps=1"
    )  # none of them left anything that blocks the corrected recipe


def test_student_levels():
    recipe = load_recipe("micro-aligned", ["student.steps=8"])
    assert recipe.student.levels == [1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]
    recipe = load_recipe("micro-decoupled", ["student.steps=2", "student.timesteps=[1, 0.4]"])
    assert recipe.student.levels == [1, 0.4]


def test_batches_are_a_pure_function_of_their_position(tiny):
    prompts = open_prompts(load_recipe("micro-aligned", []).prompts).texts("train")[:50]
    data, again = (prompt_batches(tiny, prompts, size=4, seed=1) for _ in range(2))
    for position in (3, 0, 3):
        once, twice = data(position, Shard()), again(position, Shard())
        assert torch.equal(once.noise, twice.noise)
        assert torch.equal(once.prompts.features, twice.prompts.features)
    assert not torch.equal(data(0, Shard()).noise, data(1, Shard()).noise)
    parts = [data(3, Shard(rank, 2)) for rank in range(2)]
    assert torch.equal(torch.cat([part.noise for part in parts]), data(3, Shard()).noise)


def test_heldout_prompts_are_not_in_the_training_prompts():
    trained = set(open_prompts(load_recipe("micro-aligned", []).prompts).texts("train"))
    assert len(trained) > 5000
    assert not trained & set(open_prompts(load_recipe("micro-aligned", []).prompts).texts("test"))


@pytest.mark.slow
def test_thirty_steps_move_the_student_towards_its_teacher(tmp_path):
    """The real micro teacher, a short run: the few-step images move towards the teacher's many-step ones."""
    teacher = load("micro")
    prompts = open_prompts(load_recipe("micro-aligned", []).prompts).texts("test")[:64]
    options = {"teacher=micro", *SHORT, "train.steps=30", "train.batch_size=8", "student.steps=2"}
    more = ["train.save_every=30", "optim.student.lr=3.0e-4", "optim.student.ema_decay=null"]
    made = api.distill("micro-aligned", tmp_path / "run", overrides=[*options, *more])
    classifier = EmojiClassifier.load()

    def embedding(model, steps, guidance):
        return classifier(
            generate(model, prompts, SamplingParams(steps=steps, guidance_scale=guidance)).images
        ).embedding

    target = embedding(teacher, 16, teacher.generation_config.guidance_scale)
    before = frechet_distance(embedding(teacher, 2, 0), target)
    after = frechet_distance(embedding(load(made.student), 2, 0), target)
    assert after < 0.8 * before


def test_bf16_gradients_survive_the_rollout(tiny):
    """Autocast caches cast weights; those of a rollout without gradient must not be the ones trained with."""
    student = ZImageDenoiser(copy.deepcopy(tiny.transformer)).requires_grad_(True)
    sampler = StudentSampler(student, [1.0, 0.75, 0.5, 0.25], tiny.shift)
    terms = {"cfg_augmentation": WeightedTerm(CFGAugmentation(4.0, 0.1), Constant(1.0))}
    method = DMD(tiny.denoiser, sampler, tiny.encode([""]), Renoise("hybrid", tiny.shift), terms, 1)
    seed = next(s for s in range(100) if int(torch.randint(4, (), generator=torch.Generator().manual_seed(s))) == 3)
    torch.manual_seed(seed)  # three steps of rollout
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = method.compute_student_loss(DistillBatch(torch.randn(2, 16, 8, 8), tiny.encode(["a fox", "a bear"])))
    loss.backward()
    without_gradient = [n for n, p in student.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert not without_gradient


@pytest.mark.slow
def test_multiscale_dm_in_a_recipe(tiny_folder, tmp_path):
    distill(tiny_folder, tmp_path / "run", "train.steps=2", "method.terms.distribution_matching.scales={2: 0.5}")
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["student/dm_abs_2"] > 0
    with pytest.raises(UserError, match="cannot be downsampled by 3"):
        distill(tiny_folder, tmp_path / "odd", "train.steps=1", "method.terms.distribution_matching.scales={3: 0.5}")


def test_best_student_is_saved_beside_the_last(tiny_folder, tmp_path):
    """The learning rate stands in for a quality metric."""
    best = "train.keep_best={metric: student/lr, mode: min}"  # lowest in the first step of the warm-up
    optim = "optim.student={lr: 1.0e-3, warmup_steps: 3, ema_decay: 0.5}"
    distill(tiny_folder, tmp_path / "run", "train.steps=3", "train.max_checkpoints=1", best, optim)
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*"))
    assert kept == ["step_00000001", "step_00000003"]
    last, first = (load(tmp_path / "run" / name).transformer.state_dict() for name in ("student", "student-best"))
    assert any(not tensor.equal(first[name]) for name, tensor in last.items())


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["micro-decoupled", "micro-ca", "micro-dm", "micro-dmd", "micro-dmd2", "micro-cdm"])
def test_recipes_of_the_ablation_study_run(tiny_folder, tmp_path, recipe):
    short = [f"teacher={tiny_folder}", "train.steps=1", "train.batch_size=2", "train.sample_every=0"]
    sizes = [
        "train.precision=fp32",
        "evaluate={enabled: false}",
        "trajectory={num_trajectories: 4, teacher_steps_per_student_step: 1}",
    ]
    made = api.distill(recipe, tmp_path / "run", overrides=[*short, *sizes])
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    expected = {
        "micro-ca": {"student/cfg_aug_abs": True, "student/dm_abs": False, "fake_score/loss": False},
        "micro-dm": {"student/cfg_aug_abs": False, "student/dm_abs": True, "fake_score/loss": True},
        "micro-dmd": {"student/trajectory_mse": True, "discriminator/loss": False},
        "micro-dmd2": {"student/trajectory_mse": False, "discriminator/loss": True},
    }.get(recipe, {"student/cfg_aug_abs": True, "student/dm_abs": True, "fake_score/loss": True})
    assert {key: key in line for key in expected} == expected
    assert load(made.student).generation_config.steps == 4


@pytest.mark.slow
def test_bf16_teacher_and_fp32_student(tiny_folder, tmp_path):
    distill(tiny_folder, tmp_path / "run", "train.steps=2", "models.frozen_dtype=bf16")
    student = load_file(tmp_path / "run" / "student" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in student.values()} == {torch.float32}
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["student/nonfinite_skips"] == 0
    assert 0 < line["fake_score/loss"] < 100
