"""DPO on images that people voted on: the steps, signs on Gaussians, batches of pairs, a run that resumes."""

import json
import math

import pytest
import torch
from dmd_setup import LEVELS, SHIFT, batch_of
from gaussian import SHAPE, Gaussian, prompts_of
from PIL import Image
from safetensors.torch import load_file

from fewstep import api
from fewstep.config.load import load_recipe
from fewstep.core import flow
from fewstep.core.method import Shard
from fewstep.core.samplers import normal_log_prob, sde_mean_std
from fewstep.data.preference_batches import PairBatch, preference_batches
from fewstep.errors import UserError
from fewstep.methods.dmd.terms.dpo import DPO, DPOSettings
from fewstep.methods.dmd.terms.dpo_pairs import VotedPairs
from fewstep.methods.rl.dpo import image_steps

SIGMAS = flow.sigmas_from_timesteps(LEVELS, SHIFT)
ETA = 0.9


# --- the steps ----------------------------------------------------------------------------------------------------


def test_the_steps_are_the_students_stochastic_ones_without_the_first():
    steps = image_steps(torch.randn(4, *SHAPE), SIGMAS, ETA, pairs=2)
    assert [(step.sigma, step.sigma_next) for step in steps] == [(SIGMAS[1], SIGMAS[2]), (SIGMAS[2], SIGMAS[3])]
    assert all(step.std > 0 for step in steps)
    equal = image_steps(torch.zeros(4, *SHAPE), SIGMAS, ETA, pairs=2)[0]
    for noisy in (equal.x, equal.x_next):
        assert torch.equal(noisy[:2], noisy[2:])  # one noise for both images of a pair
        assert not torch.equal(noisy[0], noisy[1])


def test_the_log_probability_of_an_image_is_its_velocitys_squared_error_on_average():
    """``-(c^2 |v - v_image|^2 / std^2 + 1) / 2`` besides the constant; c is the step's coefficient of the velocity."""
    torch.manual_seed(0)
    x0 = torch.randn(1, *SHAPE).expand(20_000, *SHAPE)
    step = image_steps(x0, SIGMAS, ETA, pairs=len(x0))[0]
    shifted = 0.3 + step.velocity
    mean, std = sde_mean_std(step.x, step.sigma, step.sigma_next, shifted, ETA)
    coefficient = step.sigma_next * math.cos(ETA * math.pi / 2) * (1 - step.sigma) - (1 - step.sigma_next) * step.sigma
    expected = -0.5 * ((coefficient * 0.3 / std) ** 2 + 1) - math.log(std) - 0.5 * math.log(2 * math.pi)
    assert normal_log_prob(step.x_next, mean, std).mean().item() == pytest.approx(expected, abs=0.01)


# --- the term -----------------------------------------------------------------------------------------------------


def term_of(student, winner, loser, count=64, beta=5.0):
    def source(position, shard):
        noise = 0.5 * torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(position))
        return PairBatch(winner + noise, loser + noise, prompts_of([0.0] * count))

    pairs = VotedPairs(source, Shard(), SIGMAS, ETA)
    return DPO(student, Gaussian().requires_grad_(False), pairs, DPOSettings(votes="x", beta=beta))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_student_moves_from_losers_to_winners(sign):
    student = Gaussian()
    term = term_of(student, sign, -sign)
    optimizer = torch.optim.SGD([student.offset], lr=0.2)
    for _ in range(10):
        loss = term.loss(term.collect(batch_of()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert student.offset.item() * sign > 0.05
    assert term.metrics()["dpo_margin"] > 0


def test_two_equal_images_give_no_gradient():
    student = Gaussian(offset=0.4)
    term = term_of(student, 1.0, 1.0)
    loss = term.loss(term.collect(batch_of()))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2))
    assert student.offset.grad.item() == pytest.approx(0.0, abs=1e-7)


def test_its_place_among_the_pairs_is_restored():
    term, other = term_of(Gaussian(), 1.0, 0.0), term_of(Gaussian(), 1.0, 0.0)
    term.collect(batch_of())
    other.load_state_dict(term.state_dict())
    torch.manual_seed(3)
    one = term.collect(batch_of()).steps[0].x
    torch.manual_seed(3)
    assert torch.equal(other.collect(batch_of()).steps[0].x, one)


# --- batches ------------------------------------------------------------------------------------------------------


@pytest.fixture
def votes(tmp_path):
    """Bright images win against dark ones."""
    folder = tmp_path / "votes"
    lines = []
    for number, prompt in enumerate(["a fox", "a bear"], start=1):
        for model, color in (("bright", 200), ("dark", 40)):
            (folder / "images" / model).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (64, 64), (color, 10 * number, 0)).save(folder / f"images/{model}/{number:04d}.png")
        left, right = ({"model": model, "image": f"images/{model}/{number:04d}.png"} for model in ("bright", "dark"))
        lines.append({"vote": number, "prompt": prompt, "left": left, "right": right, "choice": "left"})
    (folder / "votes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_batches_are_latents_of_the_images_and_the_same_on_any_number_of_processes(votes, tiny):
    source = preference_batches(votes, None, tiny, 4, seed=0)
    whole = source(3, Shard())
    image = torch.zeros(1, 3, 64, 64)
    image[:, 0], image[:, 1] = 200 / 255, 10 / 255
    latents = {round(float(each.sum()), 3) for each in whole.winners}
    assert len(latents) <= 2
    assert round(float(tiny.encode_images(image).sum()), 3) in {
        round(float(each.sum()), 3) for position in range(8) for each in source(position, Shard()).winners
    }
    parts = [source(3, Shard(rank, 2)) for rank in range(2)]
    assert torch.equal(torch.cat([part.winners for part in parts]), whole.winners)
    assert torch.equal(torch.cat([part.losers for part in parts]), whole.losers)
    assert not torch.equal(whole.winners, whole.losers)


def test_images_of_another_size_are_refused(votes, tiny):
    Image.new("RGB", (32, 64)).save(votes / "images/dark/0002.png")
    with pytest.raises(UserError, match=r"0002\.png: 64x32 pixels, the student's images have 64x64"):
        preference_batches(votes, None, tiny, 4, seed=0)


# --- recipes and runs ---------------------------------------------------------------------------------------------

SHORT = [
    *("train.batch_size=2", "train.log_every=1", "train.save_every=1", "train.sample_every=0", "train.precision=fp32"),
    *("method.fake_score_updates=1", "method.fake_score_start=0", "evaluate.enabled=false", "train.on_alert=off"),
    *("student.steps=3", "evaluate.validate_every=0", "models.train=lora", "models.rank=2", "train.steps=2"),
    *("optim.student={lr: 1.0e-2}", "optim.fake_score={lr: 1.0e-2}"),
]


def recipe(folder, dpo):
    return [f"teacher={folder}", *SHORT, f"method.terms={{distribution_matching: {{}}, dpo: {dpo}}}"]


def on_votes(folder, votes):
    """Few prompts are encoded quickly."""
    prompts = votes.parent / "train.txt"
    prompts.write_text("a cat\na dog\n")
    return [*recipe(folder, f"{{votes: {votes}}}"), f"prompts.source={prompts}"]


@pytest.mark.parametrize(
    ("dpo", "message"),
    [
        ("{}", "give rewards, or votes"),
        ("{votes: x, rewards: [{reward: emoji}]}", "give rewards, or votes"),
        ("{rewards: [{reward: emoji}], voter: me}", "voter: no effect without votes"),
    ],
)
def test_recipes_that_cannot_be_are_refused(tiny_folder, dpo, message):
    with pytest.raises(UserError, match=message):
        load_recipe("micro-aligned", recipe(tiny_folder, dpo))


def test_a_student_of_two_steps_is_refused(tiny_folder):
    with pytest.raises(UserError, match="a student of 2 steps has no stochastic step to train, it takes 3"):
        load_recipe("micro-aligned", [*recipe(tiny_folder, "{votes: x}"), "student.steps=2"])


def test_prompts_of_votes_that_the_run_is_measured_on_are_refused(votes, tiny_folder, tmp_path):
    (tmp_path / "test.txt").write_text("a bear\na cow\n")
    overrides = [*on_votes(tiny_folder, votes), f"prompts.test_source={tmp_path / 'test.txt'}"]
    with pytest.raises(UserError, match=r"method\.terms\.dpo: 1 prompts are also test prompts, such as 'a bear'"):
        api.distill("micro-aligned", tmp_path / "run", overrides=overrides)


def test_a_run_on_votes_resumes_exactly(votes, tiny_folder, tmp_path):
    overrides = on_votes(tiny_folder, votes)
    api.distill("micro-aligned", tmp_path / "whole", overrides=overrides)
    api.distill("micro-aligned", tmp_path / "parts", overrides=[*overrides, "train.max_minutes=1.0e-6"])
    api.distill("micro-aligned", tmp_path / "parts", overrides=overrides)
    one, other = (load_file(next((tmp_path / run / "lora").glob("*.safetensors"))) for run in ("whole", "parts"))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert any(tensor.abs().sum() > 0 for name, tensor in one.items() if "lora_B" in name)
    logged = json.loads((tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()[-1])
    assert logged["student/dpo_pairs"] == 1.0
