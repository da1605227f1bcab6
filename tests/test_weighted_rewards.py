"""The weighted sum of rewards: normalization, micro-batches, gradients, guards, state."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from tiny import fit, tiny_trainer
from torch import Tensor

from fewstep.errors import StopTraining, UserError
from fewstep.rewards.combine import WeightedRewards
from fewstep.rewards.open import open_reward
from fewstep.rewards.protocol import RewardInfo
from fewstep.training import checkpoint

INFINITE = (-math.inf, math.inf)


class Fake:
    """The reward of a function, which counts the images of each call."""

    def __init__(self, score: Callable[[Tensor, Sequence[str]], Tensor], name: str = "fake", **info: object) -> None:
        self.score, self.name, self.sizes = score, name, []
        self.info = RewardInfo(**({"differentiable": True, "range": INFINITE, "license": "none"} | info))

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        self.sizes.append(len(images))
        return self.score(images, prompts)


def brightness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return images.mean((1, 2, 3))


def gray(*levels: float) -> Tensor:
    return torch.tensor(levels).view(-1, 1, 1, 1).expand(-1, 3, 4, 4).clone()


PROMPTS = ["a", "b", "c", "d"]


def test_each_reward_is_normalized_by_the_moments_of_earlier_batches() -> None:
    combined = WeightedRewards({"x": (Fake(brightness), 2.0), "y": (Fake(lambda i, p: -3 * brightness(i, p)), 0.5)})
    first = [0.1, 0.4, 0.2, 0.9]
    combined(gray(*first), PROMPTS)
    assert combined.scores["y"].tolist() == pytest.approx([-3 * level for level in first])
    mean = sum(first) / 4
    deviation = (sum((level - mean) ** 2 for level in first) / 4) ** 0.5
    # 2 z + 0.5 (-z), whatever the scale of y: statistics of the first batch alone
    second = combined(gray(0.5, 0.6), ["a", "b"])
    assert second.tolist() == pytest.approx([1.5 * (level - mean) / deviation for level in (0.5, 0.6)], rel=1e-5)
    levels = [*first, 0.5, 0.6]
    mean = sum(levels) / 6
    deviation = (sum((level - mean) ** 2 for level in levels) / 6) ** 0.5
    assert combined(gray(0.3), ["a"]).tolist() == pytest.approx([1.5 * (0.3 - mean) / deviation], rel=1e-5)


def test_scores_without_spread_are_divided_by_the_floor() -> None:
    combined = WeightedRewards({"x": (Fake(brightness, range=(0.0, 10.0)), 1.0)}, floor=0.01)
    combined(gray(0.5, 0.5), ["a", "b"])
    assert combined(gray(0.6), ["a"]).item() == pytest.approx(0.1 / 0.1, rel=1e-5)


def test_the_past_counts_as_the_window_at_most() -> None:
    combined = WeightedRewards({"x": (Fake(brightness), 1.0)}, window=4)
    combined(gray(0.0, 0.0, 0.0, 0.0), PROMPTS)
    combined(gray(1.0, 1.0, 1.0, 1.0), PROMPTS)
    assert combined.state_dict()["x.moments"].tolist() == [4, 0.5, 1.0]
    combined(gray(1.0, 1.0, 1.0, 1.0), PROMPTS)
    assert combined.state_dict()["x.moments"][1] == 0.75


def test_without_normalization_the_sum_is_of_the_scores() -> None:
    rewards = {"x": (Fake(brightness, range=(0.0, 1.0)), 2.0), "y": (Fake(brightness, range=(0.0, 1.0)), -0.5)}
    combined = WeightedRewards(rewards, normalize=False)
    assert combined(gray(0.2, 0.4), ["a", "b"]).tolist() == pytest.approx([0.3, 0.6])
    assert combined.info.range == (-0.5, 2.0)


def test_micro_batches_change_no_score_and_no_gradient() -> None:
    torch.manual_seed(0)
    images = torch.rand(5, 3, 4, 4)
    found = []
    for micro_batch, sizes in ((8, [5]), (2, [2, 2, 1])):
        reward = Fake(lambda i, p: i.square().mean((1, 2, 3)))
        leaf = images.clone().requires_grad_()
        total = WeightedRewards({"x": (reward, 1.0)}, micro_batch, normalize=False)(leaf, list("abcde"))
        assert reward.sizes == sizes
        total.sum().backward()
        found.append((total.detach(), leaf.grad))
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0][1], 2 * images / 48)


def test_without_gradient_nothing_is_kept_for_a_backward_pass() -> None:
    reward = Fake(brightness, differentiable=False)
    combined = WeightedRewards({"x": (reward, 1.0)})
    assert not combined.info.differentiable
    assert not combined(gray(0.1, 0.2).requires_grad_(), ["a", "b"]).requires_grad


def fails_on_b(images: Tensor, prompts: Sequence[str]) -> Tensor:
    if "b" in prompts:
        raise ValueError("no b here\nsecond line")
    return images.square().mean((1, 2, 3))


def root_of_b(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """NaN for the prompt b, and a gradient that is NaN too."""
    sign = torch.tensor([-1.0 if prompt == "b" else 1.0 for prompt in prompts])
    return (sign * images.mean((1, 2, 3))).sqrt()


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (fails_on_b, "reward odd: ValueError: no b here; prompt: 'b'; its sample is skipped"),
        (root_of_b, "reward odd: its score is nan; prompt: 'b'; its sample is skipped"),
    ],
)
def test_a_sample_that_cannot_be_scored_is_named_and_skipped(
    score: Callable[[Tensor, Sequence[str]], Tensor], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    combined = WeightedRewards({"x": (Fake(score, name="odd"), 1.0)}, normalize=False)
    images = gray(0.1, 0.2, 0.3, 0.4).requires_grad_()
    total = combined(images, PROMPTS)
    assert total.isnan().tolist() == [False, True, False, False]
    assert message in " ".join(capsys.readouterr().err.split())
    assert combined.failures == {"x": 1}
    total[~total.isnan()].sum().backward()
    assert images.grad is not None
    assert images.grad.isfinite().all()
    assert images.grad.flatten(1).abs().sum(1).gt(0).tolist() == [True, False, True, True]
    assert combined.state_dict()["x.moments"][0] == 3


def test_a_wrong_shape_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    combined = WeightedRewards({"x": (Fake(lambda images, prompts: images.mean((2, 3)), name="wide"), 1.0)})
    assert combined(gray(0.1, 0.2), ["first", "second"]).isnan().all()
    shown = " ".join(capsys.readouterr().err.split())
    assert "reward wide: it returned the shape (1, 3) for 1 images; prompt: 'second'" in shown


def test_past_the_share_of_failures_the_training_stops() -> None:
    combined = WeightedRewards({"x": (Fake(fails_on_b, name="odd"), 1.0)}, max_failures=0.3)
    combined(torch.rand(12, 3, 4, 4), ["a"] * 9 + ["b"] * 3)
    with pytest.raises(
        StopTraining, match=r"x: no score for 44% of the last 16 images, more than max_failures 30%; .*'b'"
    ):
        combined(torch.rand(4, 3, 4, 4), ["b"] * 4)


def test_running_out_of_memory_is_no_samples_fault() -> None:
    def exhausted(images: Tensor, prompts: Sequence[str]) -> Tensor:
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        WeightedRewards({"x": (Fake(exhausted), 1.0)})(gray(0.1), ["a"])


def test_state_restores_the_statistics() -> None:
    def combined() -> WeightedRewards:
        return WeightedRewards({"x": (Fake(root_of_b), 1.0)})

    first, second = combined(), combined()
    first(gray(0.1, 0.2, 0.5, 0.9), PROMPTS)
    second.load_state_dict(first.state_dict())
    assert second.failures == {"x": 1}
    torch.testing.assert_close(second(gray(0.3), ["a"]), first(gray(0.3), ["a"]), rtol=0, atol=0)
    with pytest.raises(KeyError):
        WeightedRewards({"y": (Fake(brightness), 1.0)}).load_state_dict(first.state_dict())


def test_processes_share_statistics() -> None:
    """Two processes with half of the scores each normalize as one with all of them."""
    halves = [gray(0.1, 0.2), gray(0.7, 0.9)]
    sums: list[list[Tensor]] = [[], []]
    for rank, half in enumerate(halves):
        WeightedRewards({"x": (Fake(brightness), 1.0)}, reduce=lambda t, rank=rank: (sums[rank].append(t), t)[1])(
            half, ["a", "b"]
        )
    totals = []
    for half in halves:
        exchanged = iter(zip(*sums, strict=True))

        def reduce(tensor: Tensor, exchanged=exchanged) -> Tensor:
            return sum(next(exchanged))

        totals.append(WeightedRewards({"x": (Fake(brightness), 1.0)}, reduce=reduce)(half, ["a", "b"]))
    whole = WeightedRewards({"x": (Fake(brightness), 1.0)})(torch.cat(halves), PROMPTS)
    torch.testing.assert_close(torch.cat(totals), whole)


@pytest.mark.parametrize(
    ("rewards", "options", "message"),
    [
        ({}, {}, "name at least one"),
        ({"x": (Fake(brightness), 1.0)}, {"micro_batch": 0}, "micro_batch must be at least 1, got 0"),
        ({"x": (Fake(brightness), 1.0)}, {"floor": 0.0}, "floor must be above 0"),
    ],
)
def test_wrong_arguments_are_refused(rewards: dict, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        WeightedRewards(rewards, **options)


def test_a_training_that_a_reward_stops_has_its_checkpoint(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path)
    part = trainer.method.trainables[0]
    loss = part.loss

    def failing(batch: object) -> tuple[Tensor, dict[str, Tensor]]:
        if trainer.step == 5:
            raise StopTraining("reward ocr: it failed")
        return loss(batch)

    part.loss = failing
    with pytest.raises(UserError, match="reward ocr: it failed"):
        fit(trainer)
    found = checkpoint.latest(trainer.run.checkpoints, print)
    assert found is not None
    assert found.step == 5


def test_python_callables_are_rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rewards.py").write_text(
        "def darkness(images, prompts):\n    return [1 - float(image.mean()) for image in images]\n"
        "darkness.reward_info = 1\n"
        "def light(images, prompts):\n    return [float(image.mean()) for image in images]\n"
    )
    reward = open_reward("python:my_rewards:light")
    scores = reward(gray(0.25, 0.5).requires_grad_(), ["a", "b"])
    assert scores.tolist() == pytest.approx([0.25, 0.5])
    assert not reward.info.differentiable
    for spec, message in (
        ("python:my_rewards:darkness", "its reward_info is int"),
        ("python:my_rewards:nothing", "my_rewards has no callable nothing"),
        ("python:no_such_module:f", "no_such_module cannot be imported"),
        ("python:my_rewards", "name a callable"),
        ("python", "reward python: give a callable, as in python:MODULE:FUNCTION"),
        ("nothing", "unknown reward 'nothing'; known: "),
    ):
        with pytest.raises(UserError, match=message):
            open_reward(spec)
