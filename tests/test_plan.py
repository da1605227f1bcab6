"""Plans: what is counted without a weight is what a real model has, keeps and computes."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from fewstep.cli.main import app
from fewstep.distill.roles import make_roles
from fewstep.errors import UserError
from fewstep.models.pipeline import load
from fewstep.models.prompts import EncodedPrompts
from fewstep.planning import PROMPT_TOKENS, parse_gpu, plan
from fewstep.recipes.load import load_recipe
from fewstep.training.learner import Learner
from fewstep.training.method import Player


def recipe_of(folder, *more):
    return load_recipe("micro-decoupled", [f"teacher={folder}", "train.batch_size=4", *more])


def held(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("more", [(), ("roles.kind=lora", "roles.rank=4", "roles.fake_rank=2", "roles.base=bf16")])
def test_weights_and_states_are_those_of_real_roles(tiny_folder, more):
    recipe = recipe_of(tiny_folder, *more)
    planned = plan(recipe).memory
    dtype = torch.bfloat16 if recipe.roles.base == "bf16" else torch.float32
    teacher = load(tiny_folder, dtype=dtype)
    frozen = held(teacher.transformer.parameters())
    roles = make_roles(recipe, teacher)
    assert planned["base" if recipe.roles.kind == "lora" else "teacher"] == frozen
    assert planned["text encoder"] == held(teacher.text_encoder.parameters())
    assert planned["autoencoder"] == held(teacher.vae.parameters())
    for name, module in (("student", roles.student.denoiser), ("fake", roles.fake)):
        loss = lambda _, module=module: (sum(p.square().sum() for p in module.parameters()), {})  # noqa: E731
        learner = Learner(Player(name, module, loss), getattr(recipe.optim, name), recipe.train)
        learner.update([None], 1)
        assert planned[f"{name}'s weights"] == held(learner.weights.values())
        states = [value for state in learner.optimizer.state.values() for value in state.values() if value.ndim]
        assert planned[f"{name}'s AdamW"] == held(states)
        if learner.ema is not None:
            assert planned[f"{name}'s moving average"] == held(learner.ema.weights.values())


def real_forward(folder):
    """What a bf16 model really keeps and computes for four samples."""
    model = load(folder, dtype=torch.bfloat16)
    denoiser = model.denoiser.requires_grad_(True)
    features = torch.randn(4, PROMPT_TOKENS, model.transformer.config["cap_feat_dim"])
    prompts = EncodedPrompts(features, torch.full((4,), PROMPT_TOKENS))
    x = torch.randn(4, *model.latent_shape(model.card.height, model.card.width), requires_grad=True)
    kept = {p.untyped_storage().data_ptr(): 0 for p in denoiser.parameters()}
    alive = []

    def pack(tensor):
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes())
        alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), FlopCounterMode(display=False) as counter:
        denoiser(x, torch.rand(4), prompts)
    return sum(kept.values()), counter.get_total_flops()


def test_what_is_kept_and_computed_is_that_of_a_real_forward(tiny_folder):
    kept, flops = real_forward(tiny_folder)
    planned = plan(recipe_of(tiny_folder))
    # on a CPU attention keeps its scores in bf16, which fused attention does not
    assert planned.memory["kept for the backward pass"] == pytest.approx(kept, rel=0.3)
    calls = planned.forwards + 2 + 2 * planned.backwards  # the teacher's one call is three
    assert planned.flops == pytest.approx(calls * flops, rel=0.02)


def test_checkpointing_keeps_less_and_computes_more(tiny_folder):
    plain, saving = plan(recipe_of(tiny_folder)), plan(recipe_of(tiny_folder, "gradient_checkpointing=true"))
    name = "kept for the backward pass"
    assert saving.memory[name] < 0.6 * plain.memory[name]
    assert saving.flops > plain.flops


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
