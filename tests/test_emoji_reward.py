"""The emoji reward: the bundled weights have the stated preferences, and training works. And the background reward."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fewstep.config.load import load_recipe, parse_recipe
from fewstep.emoji.background_reward import BackgroundReward
from fewstep.emoji.dataset import BACKGROUNDS, STYLES, EmojiDataset, EmojiSpec
from fewstep.emoji.degrade import blur, degrade
from fewstep.emoji.latents import image_key
from fewstep.emoji.recipes import RewardRecipe
from fewstep.emoji.reward import BUNDLED_REWARD, EmojiReward
from fewstep.emoji.reward_net import EmojiRewardNet, phrase_hashes
from fewstep.emoji.reward_quality import COMPARED, measure_reward
from fewstep.emoji.train_reward import RewardTraining, autoencoded, generated, hard_specs, reward_batches, train
from fewstep.errors import UserError
from fewstep.evaluation.images import as_uint8
from fewstep.rewards.open import open_reward
from fewstep.rewards.scorers import open_scorer, open_scorers
from fewstep.training.run_dir import RunDir


@pytest.fixture(scope="module")
def dataset() -> EmojiDataset:
    return EmojiDataset.load()


def recipe(steps: int = 40, num_objects: int = 4, student: str | None = None) -> RewardRecipe:
    tree = {
        "kind": "reward",
        "name": "test",
        "channels": 8,
        "vae": "micro",
        "student": student,
        "data": {"num_objects": num_objects, "augmentations_per_object": 1},
        "train": {"steps": steps, "batch_size": 24, "seed": 1, "num_threads": 1},
        "optim": {"lr": 5e-3, "ema_decay": 0.9},
    }
    parsed = parse_recipe(tree, "test")
    assert isinstance(parsed, RewardRecipe)
    return parsed


def test_bundled_reward_prefers_what_its_card_states(dataset: EmojiDataset) -> None:
    reward = EmojiReward()
    stated = json.loads((BUNDLED_REWARD / "reward.json").read_text(encoding="utf-8"))["preferred"]
    measured = measure_reward(reward.net, dataset, count=128)
    card = (BUNDLED_REWARD / "README.md").read_text(encoding="utf-8")
    for key, text in COMPARED.items():
        assert measured[key] == pytest.approx(stated["real images"][key], abs=0.05)
        line = next(line for line in card.splitlines() if line.startswith(f"| {text} |"))
        for figures in stated.values():
            assert f"{100 * figures[key]:.1f}%" in line
    assert sum(file.stat().st_size for file in BUNDLED_REWARD.iterdir()) < 5 * 2**20


def test_bundled_reward_is_differentiable_and_bounded(dataset: EmojiDataset) -> None:
    reward = open_reward("emoji")
    specs = dataset.sample(8, "test")
    prompts = [dataset.prompt(spec) for spec in specs]
    images = dataset.render(specs, torch.Generator().manual_seed(0)).requires_grad_()
    scores = reward(images, prompts)
    assert bool((scores.detach().abs() <= 1).all())
    assert reward.info.range == (-1.0, 1.0)
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    assert bool((gradient.flatten(1).abs().sum(1) > 0).all())
    with torch.no_grad():
        step = 0.5 * gradient / gradient.flatten(1).norm(dim=1)[:, None, None, None]
        assert bool((reward((images + step).clamp(0, 1), prompts) > scores).all())
        larger = torch.nn.functional.interpolate(images, (128, 128), mode="bilinear")
        torch.testing.assert_close(reward(larger, prompts), scores.detach(), rtol=0, atol=0.1)


def test_other_prompts_have_no_score() -> None:
    scores = EmojiReward()(torch.rand(2, 3, 64, 64), ["a noto emoji of a cat face on a red background", "a photo"])
    assert scores.isnan().tolist() == [False, True]


def test_the_reward_is_no_scorer() -> None:
    """Evaluation's "emoji" is the classifier, and no default scorer is a reward."""
    assert type(open_scorer("emoji")).__name__ == "EmojiScorer"
    assert set(open_scorers()) == {"emoji", "nearest_real"}


def test_training_learns_and_leaves_held_out_combinations_out(tmp_path: Path) -> None:
    settings = recipe()
    with RunDir(tmp_path, settings) as run:
        folder = train(settings, run)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["reward/contrast"] < 2.7  # of a guess: log 24 = 3.18, less what equal pairs take off
    assert EmojiReward(folder).description["steps"] == 40
    assert "cosine" in (folder / "README.md").read_text()

    dataset = EmojiDataset.load(4)
    trained_on = {image_key(spec) for spec in dataset.specs("train", STYLES)}
    languages: dict = {}
    for spec in dataset.specs("train", STYLES):
        languages.setdefault(image_key(spec), []).append(spec.language)
    drawn = hard_specs(dataset, languages, 64, torch.Generator().manual_seed(0))
    assert {image_key(spec) for spec in drawn} <= trained_on
    assert all(spec.language in languages[image_key(spec)] for spec in drawn)


def test_batches_are_the_same_for_any_number_of_processes(tmp_path: Path) -> None:
    from fewstep.core.method import Shard

    settings, dataset = recipe(), EmojiDataset.load(4)
    source = reward_batches(dataset, autoencoded(dataset, settings, tmp_path), settings)
    whole, halves = source(3), [source(3, Shard(rank, 2)) for rank in range(2)]
    torch.testing.assert_close(torch.cat([half.images for half in halves]), whole.images, rtol=0, atol=0)
    assert [*halves[0].prompts, *halves[1].prompts] == whole.prompts
    torch.testing.assert_close(halves[1].same, whole.same[12:, 12:])


def test_a_students_images_of_the_same_prompts_are_ranked_below(tmp_path: Path) -> None:
    settings, dataset = recipe(student="micro-turbo"), EmojiDataset.load(4)
    made = generated(dataset, settings, tmp_path)
    assert made is not None
    batch = reward_batches(dataset, autoencoded(dataset, settings, tmp_path), settings, made)(0)
    assert batch.generated is not None
    assert batch.generated.shape == batch.degraded.shape
    prompts = batch.prompts[-len(batch.generated) :]
    assert float(EmojiReward()(batch.generated, prompts).mean()) > 0.6  # the right objects
    torch.manual_seed(0)
    training = RewardTraining(EmojiRewardNet(8), 0.0)
    with_pairs, metrics = training.loss(batch)
    alone, _ = training.loss(replace(batch, generated=None))
    assert float(with_pairs.detach()) > float(alone.detach())
    assert abs(float(metrics["generated_gap"])) < 1


def test_attack_raises_the_loss() -> None:
    torch.manual_seed(0)
    net = EmojiRewardNet(8)
    training = RewardTraining(net, 1.5)
    images, same = 0.2 + 0.6 * torch.rand(6, 3, 64, 64), torch.eye(6)
    text = torch.nn.functional.normalize(torch.randn(6, 128), dim=-1)

    def loss(some: torch.Tensor) -> float:
        return float(torch.nn.functional.cross_entropy(14 * net.image(some) @ text.T, same).detach())

    attacked = training._attacked(images, text, same, 14.0)
    assert loss(attacked) > loss(images)
    assert float((attacked - images).flatten(1).norm(dim=1).max()) <= 1.5
    assert all(p.grad is None for p in net.parameters())


def test_phrases() -> None:
    assert len(phrase_hashes("a red cat")) == 5  # three words, two pairs
    assert len(phrase_hashes("红色的")) == 6  # and a triple
    assert phrase_hashes("A red cat!") == phrase_hashes("a red cat")
    assert phrase_hashes("") == []
    assert EmojiRewardNet(8).text(["", "a"]).isfinite().all()


def test_degraded_images_are_farther_with_severity(dataset: EmojiDataset) -> None:
    images = dataset.render(dataset.sample(8, "test"), torch.Generator().manual_seed(0))
    distances = [
        (degrade(images, torch.full((8,), severity), torch.Generator().manual_seed(1)) - images).flatten(1).norm(dim=1)
        for severity in (0.1, 0.5, 1.0)
    ]
    assert bool((distances[0] < distances[1]).all())
    assert bool((distances[1] < distances[2]).all())
    flat = torch.full((2, 3, 64, 64), 0.4)
    torch.testing.assert_close(blur(flat, torch.tensor([1.0, 3.0])), flat)


def test_damaged_reward_is_one_line(tmp_path: Path) -> None:
    for name, text, message in (
        ("reward.safetensors", None, "reward.safetensors is missing: train a reward"),
        ("reward.safetensors", "{}", "reward.json is missing"),
        ("reward.json", "{}", "does not describe a reward"),
        ("reward.json", '{"channels": 8}', "does not hold the weights of this reward"),
    ):
        if text is not None:
            (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=message):
            open_reward(f"emoji:{tmp_path}")


def test_bundled_recipe_is_the_bundled_rewards() -> None:
    bundled = load_recipe("micro-reward", [])
    assert isinstance(bundled, RewardRecipe)
    description = json.loads((BUNDLED_REWARD / "reward.json").read_text(encoding="utf-8"))
    assert description["channels"] == bundled.channels


def test_background_reward_tells_the_named_color(dataset: EmojiDataset) -> None:
    reward = open_reward("background")
    assert isinstance(reward, BackgroundReward)
    specs = dataset.sample(64, "test")
    prompts = [dataset.prompt(spec, index % 3) for index, spec in enumerate(specs)]
    images = dataset.render(specs, torch.Generator().manual_seed(0))
    assert float(reward(images, prompts).min()) == 1
    names = list(BACKGROUNDS)
    other = [EmojiSpec(s.object, s.style, names[(names.index(s.background) + 1) % 8], s.language) for s in specs]
    wrong = [dataset.prompt(spec, index % 3) for index, spec in enumerate(other)]
    assert float(reward(images, wrong).max()) == 0
    assert reward(images[:1], ["a photo"]).isnan().all()


def test_rewards_are_scorers_of_an_evaluation(dataset: EmojiDataset) -> None:
    scorer = open_scorers(["background"])["background"]
    specs = dataset.sample(20, "test")
    images = as_uint8(dataset.render(specs, torch.Generator().manual_seed(0)))
    prompts = [*(dataset.prompt(spec) for spec in specs[:19]), "a photo"]
    scores = scorer.score(images, prompts)["background"]
    assert scores.tolist()[:19] == [1.0] * 19
    assert bool(scores[19].isnan())
