"""Plans: what is counted without a weight is what a real model has, keeps and computes."""

import pytest
import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from memory import most_held
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from fewstep.cli.main import app
from fewstep.config.load import BUNDLED_RECIPES, load_recipe
from fewstep.core.conditioning import EncodedPrompts
from fewstep.core.method import Trainable
from fewstep.data.batch import DistillBatch
from fewstep.errors import UserError
from fewstep.jobs import dmd_config
from fewstep.methods.dmd.method import DecoupledDMD
from fewstep.methods.models_setup import build_models
from fewstep.models.pipeline import load
from fewstep.plan.dry_run import PROMPT_TOKENS
from fewstep.plan.estimate import parse_gpu, plan
from fewstep.stages import stage_recipe
from fewstep.training.train_state import TrainState


def recipe_of(folder, *more):
    return load_recipe("micro-decoupled", [f"teacher={folder}", "train.batch_size=4", *more])


def plans_of(file, folder):
    recipe = load_recipe(file, [f"teacher={folder}"])
    return [stage_recipe(recipe, phase) for phase in recipe.stages]


def plans_of_shipped(name):
    recipe = load_recipe(name, [])
    return [stage_recipe(recipe, phase) for phase in recipe.stages]


def held(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


LORA = ("roles.kind=lora", "roles.rank=4", "roles.fake_rank=2")


@pytest.mark.parametrize("more", [(), (*LORA, "roles.base=bf16"), (*LORA, "roles.base=fp8"), ("roles.base=fp8",)])
def test_weights_and_states_are_those_of_real_roles(tiny_folder, more):
    recipe = recipe_of(tiny_folder, *more)
    found = plan(recipe)
    planned = found.memory
    dtype = torch.float32 if recipe.roles.base == "fp32" else torch.bfloat16
    teacher = load(tiny_folder, dtype=dtype)
    assert found.moments["while the teacher is loaded"] == {"teacher": held(teacher.transformer.parameters())}
    encoding = found.moments["while prompts are encoded"]
    real = held([*teacher.text_encoder.parameters(), *teacher.text_encoder.buffers()])
    assert encoding["text encoder"] == pytest.approx(real, rel=1e-3)
    roles = build_models(recipe, teacher)
    if recipe.roles.kind == "copies":
        made = held([*roles.student.denoiser.parameters(), *roles.fake.parameters()])
        assert found.moments["while roles are made"]["copies"] == made
    frozen = [p for name, p in teacher.transformer.named_parameters() if ".lora_" not in name]
    scales = [scale for name, scale in teacher.transformer.named_buffers() if name.endswith("scale")]
    assert planned["base" if recipe.roles.kind == "lora" else "teacher"] == held([*frozen, *scales])
    what = "adapters" if recipe.roles.kind == "lora" else "weights"
    for name, module in (("student", roles.student.denoiser), ("fake", roles.fake)):
        loss = lambda _, module=module: (sum(p.square().sum() for p in module.parameters()), {})  # noqa: E731
        learner = TrainState(Trainable(name, module, loss), getattr(recipe.optim, name), recipe.train)
        learner.update([None], 1)
        assert planned[f"{name}'s {what}"] == encoding[f"{name}'s {what}"] == held(learner.weights.values())
        states = [value for state in learner.optimizer.state.values() for value in state.values() if value.ndim]
        assert planned[f"{name}'s AdamW"] == held(states)
        if learner.ema is not None:
            assert planned[f"{name}'s moving average"] == held(learner.ema.weights.values())


CHECKPOINTED = "gradient_checkpointing=true"


@pytest.mark.parametrize(
    "more",
    [(), (CHECKPOINTED,), LORA, (*LORA, CHECKPOINTED), (*LORA, "roles.base=fp8", CHECKPOINTED)],
    ids=["copies", "copies, checkpointed", "lora", "lora, checkpointed", "lora on fp8, checkpointed"],
)
def test_a_step_takes_the_memory_that_was_planned(tiny_folder, more, monkeypatch):
    """To a fiftieth, on a CPU: two real updates of each trainable, after one that makes their states."""
    fused = lambda query, key, value, backend: dispatch_attention_fn(query, key, value)  # noqa: E731
    monkeypatch.setattr("fewstep.models.zimage.block.attention_fn", fused)  # in bf16 too, as on a GPU
    recipe = recipe_of(tiny_folder, "train.precision=fp32", "size=128", *more)
    planned = plan(recipe, kind="cpu").memory
    teacher = load(tiny_folder, dtype=torch.float32 if recipe.roles.base == "fp32" else torch.bfloat16)
    teacher.set_resolution(128)
    roles = build_models(recipe, teacher)
    wide = teacher.transformer.config["cap_feat_dim"]
    prompts = EncodedPrompts(torch.randn(4, PROMPT_TOKENS, wide), torch.full((4,), PROMPT_TOKENS))
    settings = dmd_config(recipe, teacher.shift)
    method = DecoupledDMD(teacher.denoiser, roles.student.denoiser, roles.fake, prompts[:1], settings)
    batch = DistillBatch(torch.randn(4, *teacher.latent_shape(128, 128)), prompts)
    most = []
    for trainable in method.trainables:
        learner = TrainState(trainable, getattr(recipe.optim, trainable.name), recipe.train)
        learner.update([batch], 1)
        learner.optimizer.zero_grad()
        most.append(most_held(lambda learner=learner: learner.update([batch, batch], 2)))
        learner.optimizer.zero_grad()
    names = ("gradients", "kept for the backward pass", "rollouts, scores, and what comes and goes")
    assert sum(planned[name] for name in names) == pytest.approx(max(most), rel=0.02)


def test_in_bf16_on_a_gpu_a_step_takes_less(tiny_folder):
    """Held to arithmetic: in bf16, with fused attention and norms, each kept number is half as long, or not kept."""
    name = "kept for the backward pass"
    whole, half = (plan(recipe_of(tiny_folder, f"train.precision={p}", *LORA)) for p in ("fp32", "bf16"))
    assert half.memory["bf16 copies"] == half.memory["student's adapters"] / 2
    assert "bf16 copies" not in whole.memory
    assert 0.3 < half.memory[name] / whole.memory[name] < 0.9


def test_operations_are_those_of_a_real_forward(tiny_folder):
    model = load(tiny_folder)
    features = torch.randn(4, PROMPT_TOKENS, model.transformer.config["cap_feat_dim"])
    prompts = EncodedPrompts(features, torch.full((4,), PROMPT_TOKENS))
    x = torch.randn(4, *model.latent_shape(model.generation_config.height, model.generation_config.width))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # the counter knows its products
        model.denoiser(x, torch.rand(4), prompts)
    planned = plan(recipe_of(tiny_folder))
    calls = planned.forwards + 2 + 2 * planned.backwards  # the teacher's one call is three
    assert planned.flops == pytest.approx(calls * counter.get_total_flops(), rel=0.02)


def test_a_forward_of_the_large_model():
    """6.15e9 parameters on 4,096 patches and 64 tokens: 2 for each of a token and a weight, and attention's."""
    found = plan(plans_of_shipped("zimage-turbo-8")[1])
    forward = found.flops / 16 / (found.forwards + 2 + 3 * found.backwards)
    assert forward == pytest.approx(55.6e12, rel=0.01)


def test_checkpointing_keeps_less_and_computes_more(tiny_folder):
    plain, saving = plan(recipe_of(tiny_folder)), plan(recipe_of(tiny_folder, "gradient_checkpointing=true"))
    name = "kept for the backward pass"
    assert saving.memory[name] < 0.6 * plain.memory[name]
    assert saving.flops > plain.flops


@pytest.mark.parametrize(("name", "gpu", "gpus"), [("zimage-turbo-8", "24", 1), ("zimage-turbo-4", "24", 1),
                                                   ("zimage-turbo-full", "80", 8)])  # fmt: skip
def test_recipes_for_the_large_model_fit(name, gpu, gpus):
    done = CliRunner().invoke(app, ["plan", name, "--gpu", gpu, "--gpus", str(gpus)])
    assert done.exit_code == 0, done.output
    assert "6,155e6 parameters" in done.output
    assert ": fits" in done.output
    assert "does not fit" not in done.output


def test_phases_are_planned_for_one_by_one(tiny_folder, tmp_path):
    """And what is advised of one can be given: by its number."""
    file = tmp_path / "two.yaml"
    text = (BUNDLED_RECIPES / "zimage-turbo-8.yaml").read_text()
    file.write_text(
        text.replace("kind: lora, base: fp8", "kind: copies, base: bf16")
        .replace("size: 512", "size: 32")
        .replace("size: 1024", "size: 128")
    )
    words = ["plan", str(file), "-s", f"teacher={tiny_folder}"]
    small, large = (plan(one) for one in plans_of(file, tiny_folder))
    assert (small.height, large.height) == (32, 128)
    assert large.flops > 1.2 * small.flops
    done = CliRunner().invoke(app, [*words, "--gpu", f"{0.99 * small.total / 0.95e9}GB"])
    assert "with -s stages.0.roles.kind=lora: " in done.output
    assert CliRunner().invoke(app, [*words, "-s", "stages.1.roles.base=fp8"]).exit_code == 0
    for wrong in ("stages.2.size=64", "stages.x.size=64", "stages.0=3", "phases=3"):
        done = CliRunner().invoke(app, [*words, "-s", wrong])
        assert done.exit_code == 1
        assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("name", ["micro-long", "micro-ca", "micro-dm", "micro-dmd2", "micro-turbo"])
def test_every_kind_of_distillation_is_planned(name):
    """Trajectories, spear or shield alone, a GAN, an alignment; the fake is made though nobody may ask it."""
    done = CliRunner().invoke(app, ["plan", name, "--gpu", "rtx4090"])
    assert done.exit_code == 0, done.output
    assert "rtx4090 (24 GB): fits" in done.output
    assert "fake's weights" in done.output
    assert ("fake's AdamW" in done.output) == (name != "micro-ca")


def test_several_gpus_share_weights_and_batches(tiny_folder):
    one, four = plan(recipe_of(tiny_folder)), plan(recipe_of(tiny_folder), gpus=4)
    for name in ("teacher", "student's weights", "fake's AdamW"):
        assert four.memory[name] == one.memory[name] / 4
    kept = "kept for the backward pass"
    assert four.memory[kept] == pytest.approx(one.memory[kept] / 4, rel=0.05)
    assert four.flops == pytest.approx(one.flops / 4, rel=0.01)


def test_gpus():
    assert parse_gpu("24GB").bytes == parse_gpu("24").bytes == parse_gpu("RTX4090").bytes == 24e9
    with pytest.raises(UserError, match="--gpu lots: give a size such as 24GB"):
        parse_gpu("lots")


def test_the_command(tiny_folder):
    def say(*words):
        done = CliRunner().invoke(app, ["plan", "micro-decoupled", "-s", f"teacher={tiny_folder}", *words])
        return done.exit_code, done.output

    code, told = say()
    assert code == 0
    assert "h100 (80 GB): fits" in told
    code, told = say("--gpu", "0.02GB")
    assert code == 0
    assert "does not fit" in told
    assert "with -s" in told
    code, told = say("--gpu", "lots")
    assert code == 1
    assert CliRunner().invoke(app, ["plan", "micro-teacher"]).exit_code == 1
