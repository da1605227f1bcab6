"""The discriminator of AdvDMD on cases whose answer is known, its AUC, gate, replay and losses."""

import pytest
import torch
from gaussian import SHAPE, prompts_of

from fewstep.core import flow
from fewstep.data.batch import DistillBatch
from fewstep.methods.adversarial.auc import auc, auc_lower_bound
from fewstep.methods.adversarial.conditions import CONDITIONS, condition_of
from fewstep.methods.adversarial.gate import Gate
from fewstep.methods.adversarial.heads import DiscriminatorHeads
from fewstep.methods.adversarial.losses import discriminator_loss, gradient_penalty
from fewstep.methods.adversarial.replay import Pairs, Replay
from fewstep.methods.dmd.terms.adversary import Adversary, AdversarySettings, is_held_out

SIGMAS = [1.0, 0.75, 0.5, 0.0]


class Pixels:
    """A feature extractor whose tokens are the noisy pixels, at each depth."""

    def features(self, x, sigma, prompts, depths):
        return x.flatten(2).transpose(1, 2).repeat(1, 1, len(depths))


class Made:
    """A step of a rollout, of which the discriminator uses the state it leads to."""

    def __init__(self, x_next):
        self.x_next = x_next


def adversary_of(shift, **options):
    """A discriminator of a student whose states are those of data N(0, 1) shifted."""
    options = {"r1_weight": 0.1, "depths": [0.5, 1.0], "hidden": 16, "window": 400, "least_pairs": 32} | options

    def simulate(batch):
        x0 = torch.randn_like(batch.noise) + shift
        levels = torch.tensor(SIGMAS[1:])[:, None].expand(-1, len(x0))
        return [Made(flow.add_noise(x0, sigma, torch.randn_like(x0))) for sigma in levels]

    heads = DiscriminatorHeads(SHAPE[0], 2, 16)
    for head in heads.heads:
        head.norm = torch.nn.Identity()  # with two features a layer norm would leave only their order
    return Adversary(Pixels(), heads, simulate, SIGMAS, AdversarySettings(**options), pretraining=10)


def batch_of(count, start=0):
    noise, real = torch.randn(count, *SHAPE), torch.randn(count, *SHAPE)
    texts = [f"prompt {start + row}" for row in range(count)]
    return DistillBatch(noise, prompts_of([0.0] * count), real[:, None], texts)


def train(adversary, steps, count=128):
    optimizer = torch.optim.Adam(adversary.heads.parameters(), lr=0.01)
    for step in range(steps):
        adversary.before_step(step)
        loss, metrics = adversary.compute_loss(batch_of(count, count * step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        adversary.after_step(step + 1)
    return metrics


def test_auc_is_the_share_of_pairs_in_order():
    assert auc(torch.tensor([3.0, 2.0]), torch.tensor([1.0, 2.0])) == pytest.approx((1 + 1 + 1 + 0.5) / 4)
    assert auc(torch.zeros(5), torch.zeros(5)) == 0.5
    assert auc_lower_bound(torch.arange(9.0) + 9, torch.arange(9.0), 0.95) == 1.0


def test_the_bound_covers_the_true_area():
    """Of scores N(1, 1) against N(0, 1) the area is Phi(1 / sqrt 2) = 0.7602; the bound is below it 19 times in 20."""
    draws = torch.Generator().manual_seed(1)
    bounds = []
    for _ in range(200):
        real, fake = torch.randn(2, 64, generator=draws)
        bounds.append(auc_lower_bound(real + 1, fake, 0.95))
    below = sum(bound < 0.7602 for bound in bounds) / len(bounds)
    assert 0.88 < below < 0.99
    assert max(bounds) > 0.7


@pytest.mark.parametrize(("shift", "opens"), [(3.0, True), (0.0, False)])
def test_it_sees_what_can_be_seen_and_nothing_else(shift, opens):
    """Separable distributions at every step, and identical ones: the areas, their bounds, and the gate."""
    torch.manual_seed(0)
    adversary = adversary_of(shift)
    metrics = train(adversary, 60)
    areas = [metrics[f"auc_{step}"].item() for step in (1, 2, 3)]
    if opens:
        assert min(areas) > 0.85
        assert areas[2] > 0.97
        assert adversary.open == [True, True, True]
    else:
        assert all(0.4 < area < 0.6 for area in areas)
        assert adversary.open == [False, False, False]
    assert "auc_low_3" in metrics


def test_conditions_of_prompts():
    prompts = ["a red apple", "一个红苹果", "りんご", 'a sign that reads "OPEN"', "写着“开门”的牌子"]
    assert [CONDITIONS[condition_of(each)] for each in prompts] == ["latin", "cjk", "cjk", "lettering", "lettering"]


def test_it_says_for_which_prompts_it_sees():
    """Scores that tell real from generated for Latin prompts alone, at two steps of different scale."""
    gate = Gate(2)
    draws = torch.Generator().manual_seed(0)
    for step, scale in ((0, 1.0), (1, 100.0)):
        condition = torch.tensor([0, 1] * 30 + [2] * 4)
        real, fake = torch.randn(2, 64, generator=draws)
        gate.add(torch.full((64,), step), scale * (real + 3 * (condition == 0)), scale * fake, condition)
    found = {name: value.item() for name, value in gate.metrics().items()}
    assert found.keys() == {"auc_latin", "auc_cjk"}  # the gate has not been updated: no areas by step
    assert found["auc_latin"] > 0.95
    assert 0.4 < found["auc_cjk"] < 0.6


def test_it_is_closed_during_pretraining():
    torch.manual_seed(0)
    adversary = adversary_of(5.0)
    adversary.gate.add(torch.zeros(40), torch.ones(40), torch.zeros(40))
    adversary.before_step(8)
    adversary.after_step(9)
    assert adversary.gate.sees[0]
    assert adversary.open == [False] * 3
    adversary.after_step(10)
    adversary.before_step(10)
    assert adversary.open == [True, False, False]


def test_held_out_prompts_give_no_gradient():
    torch.manual_seed(0)
    adversary = adversary_of(0.0, held_out=0.5)
    batch = batch_of(64)
    held_out = [is_held_out(text, 0.5) for text in batch.texts]
    assert 16 < sum(held_out) < 48
    gradients = []
    for scale in (1.0, 100.0):  # held-out real samples are changed, the others are not
        torch.manual_seed(1)
        states = batch.states * torch.where(torch.tensor(held_out), scale, 1.0)[:, None, None, None, None]
        changed = DistillBatch(batch.noise, batch.prompts, states, batch.texts)
        adversary.heads.zero_grad()
        adversary.replay = Replay(8)
        adversary.compute_loss(changed)[0].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in adversary.heads.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1])
    assert gradients[0].abs().sum() > 0


def test_losses_in_closed_form():
    real, fake = torch.tensor([[[0.5, 2.0]]]), torch.tensor([[[-2.0, 1.0]]])
    assert discriminator_loss(real, fake, "hinge").item() == pytest.approx((0.5 + 0 + 0 + 2) / 2)
    zeros = torch.zeros(1, 1, 2)
    assert discriminator_loss(zeros, zeros, "logistic").item() == pytest.approx(1.3863, abs=1e-4)
    assert gradient_penalty(real, real + 0.1).item() == pytest.approx(0.01)


def test_scores_of_different_steps_have_one_scale():
    """Calibrated scores of the student's own states have mean 0 and deviation 1 after each step."""
    torch.manual_seed(0)
    adversary = adversary_of(1.0, pretraining=0)
    train(adversary, 10)
    for moments in adversary.moments:
        moments.count = 0.0
    with torch.no_grad():
        for step in range(30):
            adversary.compute_loss(batch_of(128, 128 * step))
        batch = batch_of(2000)
        scores = adversary.scores(adversary.simulate(batch), batch.prompts, 1)
    assert scores.shape == (3, 2000)
    assert scores.mean(dim=1).abs().max() < 0.15
    assert (scores.std(dim=1) - 1).abs().max() < 0.15


def closing_gate(patience=3):
    gate = Gate(2, window=40, patience=patience)
    gate.add(torch.ones(40), torch.ones(40), torch.zeros(40))
    gate.update(5)
    return gate


def test_the_gate_opens_by_step_and_stops_for_good():
    gate = closing_gate()
    assert gate.open == [False, True]
    assert gate.opened_at == 5
    blind = torch.arange(40.0)
    gate.add(torch.ones(40), blind, blind)
    for step in (6, 7):
        gate.update(step)
        assert gate.open == [False, False]
        assert not gate.stopped
    gate.update(8)
    assert gate.stopped
    gate.add(torch.ones(40), torch.ones(40), torch.zeros(40))
    gate.update(9)
    assert gate.sees == [False, True]
    assert gate.open == [False, False]


def test_a_gate_that_was_closed_for_a_while_opens_again():
    gate = closing_gate()
    blind = torch.arange(40.0)
    for step in range(6, 12, 2):
        gate.add(torch.ones(40), blind, blind)
        gate.update(step)
        gate.add(torch.ones(40), torch.ones(40), torch.zeros(40))
        gate.update(step + 1)
    assert gate.open == [False, True]


def test_few_pairs_keep_it_closed():
    gate = Gate(1, least=32)
    gate.add(torch.zeros(31), torch.ones(31), torch.zeros(31))
    gate.update(1)
    assert gate.open == [False]


def pairs_of(first, count):
    values = torch.arange(first, first + count).float()
    return Pairs(values[:, None], -values[:, None], torch.zeros(count).long(), prompts_of(values.tolist()))


def test_replay_keeps_the_newest_and_mixes_whole_pairs():
    replay = Replay(4)
    replay.add(pairs_of(0, 3))
    replay.add(pairs_of(3, 3))
    assert replay.kept.fake.flatten().tolist() == [2, 3, 4, 5]
    replaced = torch.tensor([True, False, True])
    mixed = replay.mix(pairs_of(10, 3), replaced, torch.tensor([0.0, 0.5, 0.99]))
    assert mixed.fake.flatten().tolist() == [2, 11, 5]
    assert mixed.real.flatten().tolist() == [-2, -11, -5]
    assert mixed.prompts.features.flatten().tolist() == [2, 11, 5]


def test_state_is_restored():
    torch.manual_seed(0)
    first, second = adversary_of(3.0), adversary_of(3.0)
    train(first, 12)
    second.load_state_dict(first.state_dict())
    for name, tensor in first.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], tensor, rtol=0, atol=0)
    first.before_step(12), second.before_step(12)
    assert second.open == first.open
    assert second.gate.metrics() == first.gate.metrics()


@pytest.mark.parametrize("share", [0.25, 0.9])
def test_final_states_have_their_share(share):
    """The others are of intermediate steps alike."""
    torch.manual_seed(0)
    adversary = adversary_of(0.0, final_share=share)
    adversary.before_step(20)
    pairs, _ = adversary._pairs(batch_of(4000))
    counts = pairs.step.bincount(minlength=len(SIGMAS) - 1) / 4000
    expected = [(1 - share) / (len(SIGMAS) - 2)] * (len(SIGMAS) - 2) + [share]
    torch.testing.assert_close(counts, torch.tensor(expected), rtol=0, atol=0.03)
