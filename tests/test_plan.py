"""Plans on the meta device against the memory and arithmetic of real models."""

import pytest
import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from memory import peak_bytes
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from fewstep.cli.main import app
from fewstep.config.load import BUNDLED_RECIPES, load_recipe
from fewstep.core.conditioning import EncodedPrompts
from fewstep.core.method import Trainable
from fewstep.data.batch import DistillBatch
from fewstep.errors import UserError
from fewstep.methods.base import MethodSetup
from fewstep.methods.dmd.method import DMD
from fewstep.methods.models_setup import build_models
from fewstep.models.pipeline import load
from fewstep.plan.costs import PROMPT_TOKENS
from fewstep.plan.estimate import plan
from fewstep.plan.gpus import parse_gpu
from fewstep.stages import stage_recipe
from fewstep.training.distributed import DistContext
from fewstep.training.train_state import TrainState


def recipe_of(folder, *more):
    return load_recipe("micro-decoupled", [f"teacher={folder}", "train.batch_size=4", "train.on_alert=off", *more])


def stages_of(file, folder):
    recipe = load_recipe(file, [f"teacher={folder}"])
    return [stage_recipe(recipe, stage) for stage in recipe.stages]


def bundled_stages(name):
    recipe = load_recipe(name, [])
    return [stage_recipe(recipe, stage) for stage in recipe.stages]


def bytes_of(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


LORA = ("models.train=lora", "models.rank=4", "models.fake_score_rank=2")


@pytest.mark.parametrize(
    "more",
    [
        (),
        pytest.param((*LORA, "models.frozen_dtype=bf16"), marks=pytest.mark.slow),
        pytest.param((*LORA, "models.frozen_dtype=fp8"), marks=pytest.mark.slow),
        pytest.param(("models.frozen_dtype=fp8",), marks=pytest.mark.slow),
    ],
)
def test_weights_and_states_equal_those_of_real_models(tiny_folder, more):
    recipe = recipe_of(tiny_folder, *more)
    found = plan(recipe)
    planned = found.memory
    dtype = torch.float32 if recipe.models.frozen_dtype == "fp32" else torch.bfloat16
    teacher = load(tiny_folder, dtype=dtype)
    assert found.peaks["loading the teacher"]["teacher"] == bytes_of(teacher.transformer.parameters())
    encoding = found.peaks["encoding prompts"]
    real = bytes_of([*teacher.text_encoder.parameters(), *teacher.text_encoder.buffers()])
    assert encoding["text encoder"] == pytest.approx(real, rel=1e-3)
    models = build_models(recipe, teacher, ["fake_score"])
    fake_score = models.extra["fake_score"]
    if recipe.models.train == "full":
        made = bytes_of([*models.student.denoiser.parameters(), *fake_score.parameters()])
        assert found.peaks["copying the models"]["copies"] == made
    frozen = [p for name, p in teacher.transformer.named_parameters() if ".lora_" not in name]
    scales = [scale for name, scale in teacher.transformer.named_buffers() if name.endswith("scale")]
    assert planned["base" if recipe.models.train == "lora" else "teacher"] == bytes_of([*frozen, *scales])
    what = "adapter" if recipe.models.train == "lora" else "weights"
    for name, module in (("student", models.student.denoiser), ("fake_score", fake_score)):
        loss = lambda _, module=module: (sum(p.square().sum() for p in module.parameters()), {})  # noqa: E731
        learner = TrainState(Trainable(name, module, loss), recipe.optim[name], recipe.train)
        label = name.replace("_", " ")
        learner.update([None], 1)
        assert planned[f"{label} {what}"] == encoding[f"{label} {what}"] == bytes_of(learner.weights.values())
        states = [value for state in learner.optimizer.state.values() for value in state.values() if value.ndim]
        assert planned[f"{label} optimizer"] == bytes_of(states)
        if learner.ema is not None:
            assert planned[f"{label} EMA"] == bytes_of(learner.ema.weights.values())


GAN = ("method.terms.gan.weight=1", "optim.discriminator.lr=1e-4")
MMD = ("method.terms.mmd.weight=1",)
TRAJECTORY = ("method.terms.trajectory_mse.weight=1",)
EACH_STEP = (*LORA, "models.lora_per_step=true", "method.gradient_steps=all")
CHECKPOINTED = "models.gradient_checkpointing=true"


FP8 = (*LORA, "models.frozen_dtype=fp8", CHECKPOINTED)
CASES = {"full": (), "lora, checkpointed": (*LORA, CHECKPOINTED), "lora on fp8, checkpointed": FP8,
         "all three": (*GAN, *MMD, *TRAJECTORY), "each step": EACH_STEP}  # fmt: skip
LONGER = {"full, checkpointed": (CHECKPOINTED,), "lora": LORA, "gan": GAN, "mmd": MMD, "trajectory": TRAJECTORY,
          "lora, trajectory and mmd": (*TRAJECTORY, *MMD, *LORA)}  # fmt: skip
PARAMS = [pytest.param(more, id=label) for label, more in CASES.items()]
PARAMS += [pytest.param(more, id=label, marks=pytest.mark.slow) for label, more in LONGER.items()]


@pytest.mark.parametrize("more", PARAMS)
def test_step_takes_the_planned_memory(tiny_folder, more, monkeypatch):
    """Within 2% on a CPU: two real updates of each trainable, after one that creates the optimizer states."""
    fused = lambda query, key, value, *_: dispatch_attention_fn(query, key, value)  # noqa: E731
    monkeypatch.setattr("fewstep.models.zimage.block.attention_fn", fused)  # in bf16 too, as on a GPU
    monkeypatch.setattr("fewstep.plan.passes.DRAWS", 1)  # passes are not compared here
    recipe = recipe_of(tiny_folder, "train.precision=fp32", "resolution=128", *more)
    planned = plan(recipe, device_type="cpu").memory
    teacher = load(tiny_folder, dtype=torch.float32 if recipe.models.frozen_dtype == "fp32" else torch.bfloat16)
    teacher.set_size(128)
    models = build_models(recipe, teacher, ["fake_score"])
    width = teacher.transformer.config["cap_feat_dim"]
    prompts = EncodedPrompts(torch.randn(4, PROMPT_TOKENS, width), torch.full((4,), PROMPT_TOKENS))
    setup = MethodSetup(recipe, models, prompts[:1], {}, [], DistContext())
    method = DMD.build(setup)
    noise = torch.randn(4, *teacher.latent_shape(128, 128))
    batch = DistillBatch(noise, prompts, torch.randn(4, recipe.student.steps, *noise.shape[1:]))
    peaks = []
    for trainable in method.trainables:
        learner = TrainState(trainable, recipe.optim[trainable.name], recipe.train)
        learner.update([batch], 1)
        learner.optimizer.zero_grad()
        peaks.append(peak_bytes(lambda learner=learner: learner.update([batch, batch], 2)))
        learner.optimizer.zero_grad()
    names = ("gradients", "saved activations", "temporaries")
    assert sum(planned[name] for name in names) == pytest.approx(max(peaks), rel=0.02)


CROSSING = [
    "method.terms.trajectory_mse.weight={kind: linear, start: 1, end: 0, first_step: 10, last_step: 20}",
    *(
        f"method.terms.{name}.weight={{kind: linear, start: 0, end: 1, first_step: 10, last_step: 20}}"
        for name in ("cfg_augmentation", "distribution_matching")
    ),
]


@pytest.mark.slow
def test_terms_whose_ramps_cross_are_planned_together(tiny_folder, monkeypatch):
    """While two ramps cross both graphs are in memory, before and after only one of them."""
    monkeypatch.setattr("fewstep.plan.passes.DRAWS", 1)
    saved = [
        sum(plan(recipe_of(tiny_folder, *more)).memory[name] for name in ("saved activations", "temporaries"))
        for more in (TRAJECTORY, CROSSING, ())
    ]
    both, crossing, alone = saved
    assert crossing == pytest.approx(both, rel=0.01)
    assert both > 1.5 * alone


def test_weights_of_a_terms_own_parts_are_planned(tiny_folder, monkeypatch):
    monkeypatch.setattr("fewstep.plan.passes.DRAWS", 1)
    memory = plan(recipe_of(tiny_folder, *GAN)).memory
    assert memory["discriminator weights"] == memory["discriminator optimizer"] / 2 > 0


@pytest.mark.slow
def test_bf16_on_a_gpu_saves_smaller_activations(tiny_folder):
    """With fused attention and norms, each saved number has half the size, or is not saved."""
    name = "saved activations"
    whole, half = (plan(recipe_of(tiny_folder, f"train.precision={p}", *LORA)) for p in ("fp32", "bf16"))
    assert half.memory["bf16 copies"] == half.memory["student adapter"] / 2
    assert "bf16 copies" not in whole.memory
    assert 0.3 < half.memory[name] / whole.memory[name] < 0.9


@pytest.mark.slow
def test_flops_equal_those_of_a_real_forward(tiny_folder):
    model = load(tiny_folder)
    features = torch.randn(4, PROMPT_TOKENS, model.transformer.config["cap_feat_dim"])
    prompts = EncodedPrompts(features, torch.full((4,), PROMPT_TOKENS))
    x = torch.randn(4, *model.latent_shape(model.generation_config.height, model.generation_config.width))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # whose matrix products are counted
        model.denoiser(x, torch.rand(4), prompts)
    planned = plan(recipe_of(tiny_folder))
    passes = planned.forwards + 2 + 2 * planned.backwards  # the teacher's forward takes three batches
    assert planned.flops == pytest.approx(passes * counter.get_total_flops(), rel=0.02)


@pytest.mark.slow
def test_flops_of_the_6b_model():
    """6.15e9 parameters on 4,096 patches and 64 tokens: 2 operations for each token and weight, plus attention."""
    found = plan(bundled_stages("zimage-turbo-8")[1])
    forward = found.flops / 16 / (found.forwards + 2 + 3 * found.backwards)
    assert forward == pytest.approx(55.6e12, rel=0.01)


@pytest.mark.slow
def test_checkpointing_saves_less_and_computes_more(tiny_folder):
    plain, saving = plan(recipe_of(tiny_folder)), plan(recipe_of(tiny_folder, "models.gradient_checkpointing=true"))
    name = "saved activations"
    assert saving.memory[name] < 0.6 * plain.memory[name]
    assert saving.flops > plain.flops


@pytest.mark.slow
@pytest.mark.parametrize(("name", "gpu", "gpus", "parameters"), [
    ("zimage-turbo-8", "24", 1, "6,155e6"), ("zimage-turbo-4", "24", 1, "6,155e6"), ("zimage-dmdr", "24", 1, "6,155e6"),
    ("zimage-turbo-full", "80", 8, "6,155e6"), ("lumina-4", "24", 1, "2,610e6"), ("sd35-4", "24", 1, "2,243e6"),
    ("klein-4", "24", 1, "3,876e6"), ("wan-4", "24", 1, "1,419e6"),
])  # fmt: skip
def test_bundled_recipes_of_released_models_fit(name, gpu, gpus, parameters):
    done = CliRunner().invoke(app, ["plan", name, "--gpu", gpu, "--gpus", str(gpus)])
    assert done.exit_code == 0, done.output
    assert f"{parameters} parameters" in done.output
    assert ": fits" in done.output
    assert "does not fit" not in done.output


@pytest.mark.slow
def test_stages_are_planned_one_by_one(tiny_folder, tmp_path):
    """Suggestions name the stage by its number, as overrides do."""
    file = tmp_path / "two.yaml"
    text = (BUNDLED_RECIPES / "zimage-turbo-8.yaml").read_text()
    file.write_text(
        text.replace("train: lora, frozen_dtype: fp8", "train: full, frozen_dtype: bf16")
        .replace("resolution: 512", "resolution: 32")
        .replace("resolution: 1024", "resolution: 128")
    )
    words = ["plan", str(file), "-s", f"teacher={tiny_folder}"]
    small, large = (plan(one) for one in stages_of(file, tiny_folder))
    assert (small.height, large.height) == (32, 128)
    assert large.flops > 1.2 * small.flops
    done = CliRunner().invoke(app, [*words, "--gpu", f"{0.99 * small.total / 0.95e9}GB"])
    assert "with -s stages.0.models.train=lora: " in done.output
    assert CliRunner().invoke(app, [*words, "-s", "stages.1.models.frozen_dtype=fp8"]).exit_code == 0
    for wrong in ("stages.2.resolution=64", "stages.x.resolution=64", "stages.0=3", "phases=3"):
        done = CliRunner().invoke(app, [*words, "-s", wrong])
        assert done.exit_code == 1
        assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_gpus_share_weights_and_batches(tiny_folder):
    one, four = plan(recipe_of(tiny_folder)), plan(recipe_of(tiny_folder), gpus=4)
    for name in ("teacher", "student weights", "fake score optimizer"):
        assert four.memory[name] == one.memory[name] / 4
    saved = "saved activations"
    assert four.memory[saved] == pytest.approx(one.memory[saved] / 4, rel=0.05)
    assert four.flops == pytest.approx(one.flops / 4, rel=0.01)
    lora = recipe_of(tiny_folder, "models.train=lora", "models.rank=4")
    one, four = plan(lora).memory, plan(lora, gpus=4).memory
    shares = {name: one[name] / four[name] for name in ("base", "student adapter", "gradients", "fake score optimizer")}
    assert shares == {"base": 4, "student adapter": 1, "gradients": 1, "fake score optimizer": 1}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.batch_size=6", "train.batch_size 6 is not a multiple of the 4 processes"),
        ("optim.fake_score.optimizer=adamw8bit", "optim.fake_score.optimizer=adamw8bit works with one process only"),
    ],
)
def test_what_several_gpus_cannot_train_is_not_planned(tiny_folder, override, message):
    with pytest.raises(UserError, match=message):
        plan(recipe_of(tiny_folder, override), gpus=4)


@pytest.mark.slow
def test_savings_that_several_gpus_cannot_train_are_not_suggested(tiny_folder):
    more = ("-s", "train.batch_size=2", "--gpus", "2", "--gpu", "0.0001GB")
    code, output = planned("-s", f"teacher={tiny_folder}", *more)
    assert code == 0, output
    assert "with -s" in output
    assert "adamw8bit" not in output
    assert "still too large" in output


def test_gpu_by_name_or_size():
    assert parse_gpu("24GB").bytes == parse_gpu("24").bytes == parse_gpu("RTX4090").bytes == 24e9
    for wrong in ("lots", "nan", "inf", "0GB", "-24GB"):
        with pytest.raises(UserError, match=f"--gpu {wrong}: give a size such as 24GB"):
            parse_gpu(wrong)


def planned(*words):
    done = CliRunner().invoke(app, ["plan", "micro-decoupled", *words])
    return done.exit_code, done.output


def test_command(tiny_folder):
    code, output = planned("-s", f"teacher={tiny_folder}")
    assert code == 0
    assert "h100 (80 GB): fits" in output
    assert planned("-s", f"teacher={tiny_folder}", "--gpu", "lots")[0] == 1
    assert CliRunner().invoke(app, ["plan", "micro-teacher"]).exit_code == 1


@pytest.mark.slow
def test_command_names_what_would_fit(tiny_folder):
    code, output = planned("-s", f"teacher={tiny_folder}", "--gpu", "0.02GB")
    assert code == 0
    assert "does not fit" in output
    assert "with -s" in output
