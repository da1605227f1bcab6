"""A whole distillation on a tiny model: exact resume, mistakes, and a student that diffusers opens."""

import copy
import json

import pytest
import torch
from diffusers import ZImagePipeline
from safetensors.torch import load_file

from fewstep import api
from fewstep.config.load import load_recipe
from fewstep.config.student_schedule import student_timesteps
from fewstep.data.batch import DistillBatch
from fewstep.data.prompts import training_prompts
from fewstep.data.teacher_trajectories import make_cache
from fewstep.emoji.classifier import EmojiClassifier
from fewstep.errors import UserError
from fewstep.evaluation.metrics import frechet_distance
from fewstep.evaluation.runner import emoji_prompts
from fewstep.inference.generate import generate
from fewstep.inference.params import SamplingParams
from fewstep.jobs import dmd_config, prompt_batches
from fewstep.methods.dmd.method import DecoupledDMD
from fewstep.models.pipeline import load
from fewstep.models.zimage.denoiser import ZImageDenoiser

SHORT = [
    *("train.batch_size=2", "train.log_every=1", "train.save_every=2", "train.sample_every=0"),
    *(
        "train.precision=fp32",
        "fake_updates=2",
        "evaluate.enabled=false",
        "shield.regression=0",
        "align=0",
        "fake_warmup=0",
        "optim.student.lr_schedule=constant",
    ),
]


def distil(folder, out, *more):
    return api.distill("micro-turbo", out, overrides=[f"teacher={folder}", *SHORT, *more])


def weights(run):
    files = sorted(run.glob("student/*/*.safetensors"))
    assert len(files) == 3
    return {f"{file.parent.name}/{name}": tensor for file in files for name, tensor in load_file(file).items()}


def test_resume_is_bit_exact_and_the_student_is_a_pipeline(tiny, tiny_folder, tmp_path):
    distil(tiny_folder, tmp_path / "whole", "train.steps=4")
    distil(tiny_folder, tmp_path / "parts", "train.steps=2")
    distil(tiny_folder, tmp_path / "parts", "train.steps=4")
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, parts[name]), name

    # it did learn something, in the transformer alone
    moved = {name.split("/")[0] for name, tensor in weights(tmp_path / "whole").items() if changed(name, tensor, tiny)}
    assert moved == {"transformer"}
    card = load(tmp_path / "whole" / "student").generation_config
    assert (card.steps, card.guidance_scale, card.guidance_distilled) == (4, 0.0, True)
    assert card.sigmas == pytest.approx([1.0, 0.9, 0.75, 0.5, 0.0])
    assert card.teacher == str(tiny_folder)
    assert ZImagePipeline.from_pretrained(tmp_path / "whole" / "student").transformer is not None

    lines = [json.loads(line) for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert {"student/loss", "fake/loss", "student/ca", "student/dm", "student/cosine"} <= set(lines[0])
    assert 0.1 < lines[0]["student/x0_std_over_teacher"] < 2  # the student starts as the teacher
    for name in ("recipe.yaml", "checkpoints", "student"):
        assert (tmp_path / "whole" / name).exists()


def test_alignment_is_a_share_of_the_steps(tiny_folder, tmp_path):
    """The shipped recipe's way: two steps that follow the teacher, the fake joining in the second; then two of DMD."""
    more = ("align=0.5", "fake_warmup=1", "shield.regression=1", "trajectory.samples=4", "train.steps=4")
    distil(tiny_folder, tmp_path / "run", *more)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert ["student/ca" in line for line in lines] == [False, False, True, True]
    assert ["fake/loss" in line for line in lines] == [False, True, True, True]
    with pytest.raises(
        UserError, match=r"align: it needs evenly spaced anchors .* set align and shield\.regression to 0"
    ):
        distil(tiny_folder, tmp_path / "other", *more, "student.sampler=sde")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["copies", "lora"])
def test_compiled_run_learns_the_same(tiny_folder, tmp_path, kind):
    for name, more in (("eager", ()), ("compiled", ("compile=true", "gradient_checkpointing=true"))):
        distil(tiny_folder, tmp_path / name, "train.steps=2", f"roles.kind={kind}", *more)
    eager, compiled = weights(tmp_path / "eager"), weights(tmp_path / "compiled")
    for name, tensor in eager.items():
        torch.testing.assert_close(tensor, compiled[name], atol=1e-3, rtol=1e-3)


def changed(name, tensor, model):
    part, _, key = name.partition("/")
    return not torch.equal(tensor, getattr(model, part).state_dict()[key])


@pytest.mark.parametrize(
    "more",
    [
        ("renoise.schedule=shared",),
        ("renoise.schedule=constrained", "student.sampler=sde", "student.steps=2"),
        ("renoise.schedule=full", "shield.enabled=false", "student.anchor_schedule=continuous"),
        ("spear.enabled=false", "fake_follow=0.01", "student.steps=1"),
    ],
)
def test_every_option_runs(tiny_folder, tmp_path, more):
    made = distil(tiny_folder, tmp_path / "run", "train.steps=1", *more)
    student = load(made.student)
    assert api.generate(student, "a fox").images.shape == (1, 64, 64, 3)


def test_size_is_that_of_training_and_of_the_student(tiny_folder, tmp_path):
    more = ("train.steps=2", "shield.regression=1", "trajectory.samples=4", "size=32")
    made = distil(tiny_folder, tmp_path / "run", *more)
    assert (load(made.student).generation_config.height, load(made.student).generation_config.width) == (32, 32)
    assert generate(load(made.student), ["a fox"]).images.shape == (1, 32, 32, 3)
    cached = load_file(next((tmp_path / "run" / "cache").glob("*.safetensors")))
    assert cached["states"].shape[-2:] == (4, 4)
    where = f"trajectory.cache={tmp_path / 'large'}"
    for size in ("64", "32"):
        asked = ["samples=4", "substeps=4", f"teacher={tiny_folder}", f"size={size}"]
        make_cache(load_recipe("micro-cache", asked), tmp_path / ("large" if size == "64" else "small"))
    with pytest.raises(UserError, match="latent"):
        distil(tiny_folder, tmp_path / "other", *more, where)
    distil(tiny_folder, tmp_path / "same", *more, where.replace("large", "small"))


def test_own_prompts(tiny_folder, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a fox\n一只狐狸\n", encoding="utf-8")
    made = distil(tiny_folder, tmp_path / "run", "train.steps=1", "train.sample_every=1", f"prompts.source={file}")
    assert made.student.is_dir()
    assert (tmp_path / "run" / "previews" / "step_000001.png").is_file()


def test_mistakes(tiny_folder, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    for more, message in [
        (("spear.enabled=false", "shield.enabled=false"), "both off"),
        (("student.anchors=[0.9, 0.5]", "student.steps=2"), "start at 1 and fall"),
        (("student.anchors=[1, 0.5]",), "student.steps levels"),
        ((f"prompts.source={empty}",), "no prompts in it"),
        (("teacher=nowhere",), "no model there"),
    ]:
        with pytest.raises(UserError, match=message):
            distil(tiny_folder, tmp_path / "run", *more)
    distil(tiny_folder, tmp_path / "run", "train.steps=1")  # and none of them is in the way of the mended recipe


def test_anchors():
    recipe = load_recipe("micro-turbo", ["student.steps=8"])
    assert student_timesteps(recipe) == [1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]
    recipe = load_recipe("micro-turbo", ["student.steps=2", "student.anchors=[1, 0.4]"])
    assert student_timesteps(recipe) == [1, 0.4]


def test_batches_depend_on_their_number_alone(tiny):
    prompts = training_prompts(load_recipe("micro-turbo", []).prompts)[:50]
    data, again = (prompt_batches(tiny, prompts, size=4, seed=1) for _ in range(2))
    for position in (3, 0, 3):
        once, twice = data(position), again(position)
        assert torch.equal(once.noise, twice.noise)
        assert torch.equal(once.prompts.features, twice.prompts.features)
    assert not torch.equal(data(0).noise, data(1).noise)


def test_heldout_prompts_are_not_trained_on():
    trained = set(training_prompts(load_recipe("micro-turbo", []).prompts))
    assert len(trained) > 5000
    assert not trained & set(emoji_prompts(500))


def test_thirty_steps_bring_the_student_nearer_to_its_teacher(tmp_path):
    """The real micro teacher, a short run: the few-step images move towards the teacher's many-step ones."""
    teacher = load("micro")
    prompts = emoji_prompts(64)
    options = {"teacher=micro", *SHORT, "train.steps=30", "train.batch_size=8", "student.steps=2"}
    more = ["train.save_every=30", "optim.student.lr=3.0e-4", "optim.student.ema_decay=null"]
    made = api.distill("micro-turbo", tmp_path / "run", overrides=[*options, *more])
    judge = EmojiClassifier.load()

    def seen(model, steps, guidance):
        return judge(generate(model, prompts, SamplingParams(steps=steps, guidance_scale=guidance)).images).embedding

    target = seen(teacher, 16, teacher.generation_config.guidance_scale)
    before = frechet_distance(seen(teacher, 2, 0), target)
    after = frechet_distance(seen(load(made.student), 2, 0), target)
    assert after < 0.8 * before


def test_bf16_gradients_survive_the_rollout(tiny):
    """Autocast keeps cast weights; those kept in a rollout without gradient must not be the ones trained with."""
    student = ZImageDenoiser(copy.deepcopy(tiny.transformer)).requires_grad_(True)
    settings = dmd_config(load_recipe("micro-turbo", []), tiny.shift)
    method = DecoupledDMD(tiny.denoiser, student, copy.deepcopy(tiny.denoiser), tiny.encode([""]), settings)
    seed = next(s for s in range(100) if int(torch.randint(4, (), generator=torch.Generator().manual_seed(s))) == 3)
    torch.manual_seed(seed)  # three steps of rollout
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = method.student_loss(DistillBatch(torch.randn(2, 16, 8, 8), tiny.encode(["a fox", "a bear"])))
    loss.backward()
    silent = [n for n, p in student.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert not silent


def test_coarser_scales_in_a_recipe(tiny_folder, tmp_path):
    distil(tiny_folder, tmp_path / "run", "train.steps=2", "shield.scales={2: 0.5}")
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["student/dm_2"] > 0
    with pytest.raises(UserError, match="cannot be 3 times coarser"):
        distil(tiny_folder, tmp_path / "odd", "train.steps=1", "shield.scales={3: 0.5}")


def test_best_student_is_saved_beside_the_last(tiny_folder, tmp_path):
    """The fake's loss stands in for a quality: whichever step is best, it is not lost."""
    best = "train.keep_best={metric: student/lr, mode: min}"  # lowest in the first step of the warm-up
    optim = "optim.student={lr: 1.0e-3, warmup_steps: 3, ema_decay: 0.5}"
    distil(tiny_folder, tmp_path / "run", "train.steps=3", "train.max_checkpoints=1", best, optim)
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*"))
    assert kept == ["step_00000001", "step_00000003"]
    last, first = (load(tmp_path / "run" / name).transformer.state_dict() for name in ("student", "student-best"))
    assert any(not tensor.equal(first[name]) for name, tensor in last.items())


@pytest.mark.parametrize("recipe", ["micro-decoupled", "micro-ca", "micro-dm", "micro-dmd", "micro-dmd2", "micro-cdm"])
def test_recipes_of_the_ablation_run(tiny_folder, tmp_path, recipe):
    short = [f"teacher={tiny_folder}", "train.steps=1", "train.batch_size=2", "train.sample_every=0"]
    sizes = ["train.precision=fp32", "evaluate={enabled: false}", "trajectory={samples: 4, substeps: 1}"]
    made = api.distill(recipe, tmp_path / "run", overrides=[*short, *sizes])
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    expected = {
        "micro-ca": {"student/ca": True, "student/dm": False, "fake/loss": False},
        "micro-dm": {"student/ca": False, "student/dm": True, "fake/loss": True},
        "micro-dmd": {"student/regression": True, "discriminator/loss": False},
        "micro-dmd2": {"student/regression": False, "discriminator/loss": True},
    }.get(recipe, {"student/ca": True, "student/dm": True, "fake/loss": True})
    assert {key: key in line for key in expected} == expected
    assert load(made.student).generation_config.steps == 4


def test_bf16_teacher_and_fp32_learners(tiny_folder, tmp_path):
    distil(tiny_folder, tmp_path / "run", "train.steps=2", "roles.base=bf16")
    student = load_file(tmp_path / "run" / "student" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in student.values()} == {torch.float32}
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["student/skipped"] == 0
    assert 0 < line["fake/loss"] < 100
