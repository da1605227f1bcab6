"""The reward learned from votes: its loss, its features, its agreement, and its files."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_checkpoints import save_clip
from torch import Tensor

from fewstep.core.registry import load_plugins, rewards
from fewstep.data.preferences import Candidate, Choice
from fewstep.errors import UserError
from fewstep.preferences.agreement import agreement, wilson
from fewstep.preferences.features import open_preference_features, opened_spec, stored_spec
from fewstep.preferences.head import PreferenceHead, fit_head, load_head, save_head, vote_loss
from fewstep.preferences.image_batches import image_batches
from fewstep.preferences.reward import PreferenceReward
from fewstep.preferences.train import train_head
from fewstep.preferences.vote_log import VoteLog
from fewstep.rewards.clip_model import ClipModel
from fewstep.rewards.protocol import RewardInfo
from fewstep.rewards.specs import open_plugin

PROMPTS = [f"prompt number {number}" for number in range(60)]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("networks") / "clip")


@pytest.fixture(scope="module")
def votes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models' images of a color each; the redder one wins, on every tenth prompt neither."""
    folder, draw = tmp_path_factory.mktemp("votes"), np.random.default_rng(0)
    with VoteLog(folder / "votes.jsonl") as log:
        for number, prompt in enumerate(PROMPTS):
            reds, sides = draw.permutation([40, 200]).tolist(), []
            for name, red in zip("ab", reds, strict=True):
                file = folder / "images" / name / f"{number:04d}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (32, 32), (red, *draw.integers(0, 255, 2).tolist())).save(file)
                sides.append(Candidate(model=name, image=file.relative_to(folder).as_posix()))
            choice: Choice = "tie" if number % 10 == 0 else "left" if reds[0] > reds[1] else "right"
            log.add(prompt, sides[0], sides[1], choice, "human")
    return folder


def test_loss_of_wins_and_ties() -> None:
    margins = torch.tensor([0.3, -1.2, 2.0])
    assert vote_loss(margins[:1], torch.ones(1)) == pytest.approx(-torch.sigmoid(margins[0]).log().item())
    both = vote_loss(margins, torch.full((3,), 0.5))
    assert both == pytest.approx((vote_loss(margins, torch.ones(3)) + vote_loss(margins, torch.zeros(3))).item() / 2)


def test_one_feature_has_the_closed_form() -> None:
    """With features 0 and 1, the margin is the log-odds of the wins, ties as half; without penalty."""
    features = torch.tensor([[0.0, 5.0], [1.0, 5.0]])  # the second feature is constant
    ones, zeros = torch.ones(10, dtype=torch.long), torch.zeros(10, dtype=torch.long)
    outcomes = torch.tensor([1.0] * 6 + [0.5] * 2 + [0.0] * 2)  # 7 wins to 3
    head = fit_head(features, ones, zeros, outcomes, l2=0.0)
    assert float(head(features[1:]) - head(features[:1])) == pytest.approx(np.log(7 / 3), abs=1e-5)
    assert head(torch.tensor([[1.0, 99.0]])) == pytest.approx(head(features[1:]), abs=1e-6)
    shrunk = fit_head(features, ones, zeros, outcomes, l2=1.0)
    assert 0 < float(shrunk(features[1:]) - shrunk(features[:1])) < np.log(7 / 3) / 2


def test_known_weights_are_recovered() -> None:
    draw = torch.Generator().manual_seed(0)
    features, weights = torch.randn(8000, 4, generator=draw) + 3, torch.tensor([1.0, -0.5, 0.0, 2.0])
    left, right = torch.arange(4000), torch.arange(4000, 8000)
    chance = torch.sigmoid((features[left] - features[right]) @ weights)
    outcomes = (torch.rand(4000, generator=draw) < chance).float()
    head = fit_head(features, left, right, outcomes, l2=1e-6)
    assert (head.weight / head.scale).tolist() == pytest.approx(weights.tolist(), abs=0.15)
    assert float(head(features).mean()) == pytest.approx(0, abs=1e-4)


def test_the_span_of_the_differences_is_sufficient() -> None:
    """Fewer votes than features: the same head as with copies of the votes, which are more than the features."""
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(20, 30, generator=draw)
    left, right, outcomes = torch.arange(10), torch.arange(10, 20), torch.tensor([1.0, 0.5, 1.0, 0.0, 1.0] * 2)
    few = fit_head(features, left, right, outcomes, l2=0.1)
    many = fit_head(features, left.repeat(4), right.repeat(4), outcomes.repeat(4), l2=0.1)
    assert few.weight.abs().max() > 0.05
    assert few.weight.tolist() == pytest.approx(many.weight.tolist(), abs=1e-5)


def test_wilson_interval() -> None:
    """Newcombe (Statistics in Medicine 17, 1998), table I: 81/263 and 0/20."""
    assert wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)


def test_dependent_votes_widen_the_interval() -> None:
    right = np.random.default_rng(0).random(50) < 0.7
    alone = agreement(right, [str(i) for i in range(50)])
    repeated = agreement(np.repeat(right, 8), [str(i) for i in range(50) for _ in range(8)])
    assert (repeated.share, repeated.votes) == (alone.share, 400)
    assert (repeated.low, repeated.high) == pytest.approx((alone.low, alone.high), abs=1e-6)
    perfect = agreement(np.ones(40, bool), [str(i // 4) for i in range(40)])
    assert perfect.low == pytest.approx(wilson(1.0, 10)[0])


def test_training(votes: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = train_head(votes, tmp_path / "head", features=f"clip:{clip}")
    assert found.held_out.share > 0.8
    assert found.held_out.low > found.models_alone.share - 0.1  # the votes do not follow from the models alone
    assert found.description["ties"] == 6
    assert found.description["held_out_prompts"] == 12
    stored = json.loads((tmp_path / "head" / "preference.json").read_text(encoding="utf-8"))
    assert stored == {"format": 1} | found.description

    load_plugins()
    monkeypatch.chdir(tmp_path)
    reward = open_plugin(rewards, "preference:head", "cpu")
    assert isinstance(reward, PreferenceReward)
    assert reward.info.differentiable
    images = torch.zeros(2, 3, 32, 32)
    images[1, 0] = 0.8
    images.requires_grad_()
    scores = reward(images, ["a", "b"])
    assert scores.dtype == torch.float32
    assert scores[1] > scores[0]
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    assert gradient.isfinite().all()
    assert gradient[0].abs().sum() > 0
    assert reward.info.parameters > 1000


def test_a_head_and_its_network_can_be_moved(votes: Path, clip: Path, tmp_path: Path) -> None:
    shutil.copytree(clip, tmp_path / "old" / "clip")
    train_head(votes, tmp_path / "old" / "head", features=f"clip:{tmp_path / 'old' / 'clip'}")
    (tmp_path / "old").rename(tmp_path / "new")
    images = torch.rand(2, 3, 32, 32)
    assert PreferenceReward(str(tmp_path / "new" / "head"))(images, ["a", "b"]).isfinite().all()


def test_features_without_gradient(votes: Path, tmp_path: Path) -> None:
    lines = (votes / "votes.jsonl").read_text(encoding="utf-8").splitlines()[1:15]
    (tmp_path / "votes.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "images").symlink_to(votes / "images")
    found = train_head(tmp_path, tmp_path / "head")
    reward = PreferenceReward(str(tmp_path / "head"))
    assert found.description["features"] == "open-nsfw"
    assert not reward.info.differentiable
    wanted = torch.rand(1, 3, 32, 32, requires_grad=True)
    assert not reward(wanted, ["a"]).requires_grad
    assert found.held_out.votes == 2  # and a tie


class TwoColors:
    """A reward with embeddings: the image's mean color, and a constant for the prompt."""

    name, info = "two_colors", RewardInfo(True, (0.0, 1.0), "none", parameters=7)

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return images.mean((1, 2, 3))

    def embeddings(self, images: Tensor, prompts: list[str]) -> tuple[Tensor, Tensor]:
        return images.mean((2, 3)), torch.full((len(prompts), 3), 2.0)


def test_features_of_a_reward(votes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rewards._entries, "two_colors", TwoColors)
    found = train_head(votes, tmp_path / "head", features="reward:two_colors")
    assert found.held_out.share == 1.0
    assert found.description["dimensions"] == 6
    reward = PreferenceReward(str(tmp_path / "head"))
    assert reward.info.differentiable
    assert reward.info.parameters > 7
    monkeypatch.setitem(rewards._entries, "plain", lambda: torch.nn.Identity())
    with pytest.raises(UserError, match="features reward:plain: this reward has no embeddings"):
        open_preference_features("reward:plain")


def test_clip_features_are_those_of_the_library(clip: Path) -> None:
    from transformers import CLIPModel, CLIPProcessor

    ours = ClipModel(str(clip))
    pixels = np.random.default_rng(0).integers(0, 255, (2, 45, 64, 3)).astype(np.uint8)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
    texts = ["a fox", "a much longer prompt than the others, longer than the network takes"]
    processor = CLIPProcessor.from_pretrained(clip)
    inputs = processor(
        text=texts, images=[Image.fromarray(each) for each in pixels], return_tensors="pt", padding=True,
        truncation=True, max_length=ours.max_tokens,
    )  # fmt: skip
    difference = (ours.preprocess(images) - inputs["pixel_values"]).abs() * 0.27 * 255
    assert difference.mean() < 0.6  # of 255
    assert difference.max() < 6
    with torch.no_grad():
        out = CLIPModel.from_pretrained(clip)(**inputs)
        image, text = ours.image(images), ours.text(texts)
    assert (image * out.image_embeds).sum(1).tolist() == pytest.approx([1, 1], abs=1e-3)
    assert text.flatten().tolist() == pytest.approx(out.text_embeds.flatten().tolist(), abs=1e-5)


def test_images_of_several_sizes(tmp_path: Path) -> None:
    from fewstep.preferences.image_batches import PromptedImage

    for name, size in [("a", 8), ("b", 16), ("c", 8)]:
        Image.new("RGB", (size, size), (255, 0, 51)).save(tmp_path / f"{name}.png")
    batches = list(image_batches(tmp_path, [PromptedImage(name, f"{name}.png") for name in "abc"]))
    assert [[one.prompt for one in keys] for keys, _ in batches] == [["a", "c"], ["b"]]
    assert batches[0][1].shape == (2, 3, 8, 8)
    assert batches[0][1][0, :, 0, 0].tolist() == pytest.approx([1.0, 0.0, 0.2])


def test_specs_with_paths(tmp_path: Path) -> None:
    (tmp_path / "clip").mkdir()
    stored = stored_spec(f"clip:{tmp_path / 'clip'}", tmp_path / "head")
    assert stored == "clip:../clip"
    assert opened_spec(stored, tmp_path / "head") == f"clip:{tmp_path / 'clip'}"
    assert stored_spec(f"reward:emoji:{tmp_path / 'clip'}", tmp_path) == "reward:emoji:./clip"
    for spec in ("open-nsfw", "clip:openai/clip-vit-base-patch32", "reward:emoji", "reward:x:owner/name"):
        assert opened_spec(stored_spec(spec, tmp_path), tmp_path) == spec


def test_bad_heads_and_votes(votes: Path, tmp_path: Path) -> None:
    head = tmp_path / "head"
    with pytest.raises(UserError, match=r"preference\.safetensors is missing; fewstep prefs train writes a head"):
        load_head(head)
    save_head(head, PreferenceHead(*torch.ones(3, 5)), {"features": "open-nsfw"})
    with pytest.raises(UserError, match="1024 features, but the head was trained on 5"):
        PreferenceReward(str(head))(torch.rand(1, 3, 8, 8), ["a"])
    with pytest.raises(UserError, match="holds a head already; use another --out, or --overwrite"):
        train_head(votes, head)
    (head / "preference.json").write_text('{"format": 2}', encoding="utf-8")
    with pytest.raises(UserError, match=r"preference\.json does not describe a preference head"):
        load_head(head)
    (head / "preference.json").write_text('{"format": 1, "features": "open-nsfw"}', encoding="utf-8")
    (head / "preference.safetensors").write_bytes(b"oops")
    with pytest.raises(UserError, match=r"preference\.safetensors does not hold a preference head"):
        load_head(head)
    (head / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match=r"holds other files, such as notes\.txt"):
        train_head(votes, head, overwrite=True)


def test_too_few_votes_and_scorers(votes: Path, clip: Path, tmp_path: Path) -> None:
    lines = (votes / "votes.jsonl").read_text(encoding="utf-8").splitlines()
    shutil.copytree(votes / "images", tmp_path / "images")
    file = tmp_path / "votes.jsonl"
    file.write_text("\n".join(lines[:9]), encoding="utf-8")
    with pytest.raises(UserError, match="votes on 9 prompts; a head needs votes on at least 10"):
        train_head(tmp_path, tmp_path / "head")
    ties = [json.loads(line) | {"choice": "tie"} for line in lines[:20]]
    file.write_text("\n".join(map(json.dumps, ties)), encoding="utf-8")
    with pytest.raises(UserError, match="the votes on the held-out prompts are all ties"):
        train_head(tmp_path, tmp_path / "head")
    file.write_text("\n".join(lines).replace('"human"', '"scorer:emoji"'), encoding="utf-8")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train_head(tmp_path, tmp_path / "head", features=f"clip:{clip}")
    assert "scorer:emoji: a model that is trained on this head must not be measured" in str(caught[0].message)
