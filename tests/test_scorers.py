"""Scorers: opening them by name, and the CLIP score on a tiny random checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_checkpoints import MAX_TOKENS, save_clip
from transformers import CLIPModel, CLIPProcessor

from fewstep.core.registry import scorers
from fewstep.errors import UserError
from fewstep.rewards.clip_score import BATCH_SIZE
from fewstep.rewards.scorers import open_scorer, open_scorers


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def images() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (BATCH_SIZE + 2, 40, 40, 3), generator=generator, dtype=torch.uint8)


def test_clip_score_is_the_cosine_of_image_and_prompt(clip: Path, images: torch.Tensor) -> None:
    prompts = ["a fox" if index % 2 else "two boats" for index in range(len(images))]
    scores = open_scorer(f"clip_score:{clip}").score(images, prompts)["clip_score"]
    model, processor = CLIPModel.from_pretrained(clip).eval(), CLIPProcessor.from_pretrained(clip)
    pictures = [Image.fromarray(image.numpy()) for image in images]
    with torch.no_grad():
        out = model(**processor(text=prompts, images=pictures, return_tensors="pt", padding=True))
    expected = 100 * torch.cosine_similarity(out.image_embeds, out.text_embeds)
    assert expected.max() > 0
    torch.testing.assert_close(scores, expected.clamp(min=0))


def test_clip_score_truncates_long_prompts(clip: Path, images: torch.Tensor) -> None:
    """Its text encoder has no positions beyond its maximal length."""
    scorer = open_scorer(f"clip_score:{clip}")
    long, longer = "b " * MAX_TOKENS, "b " * 3 * MAX_TOKENS
    scores = scorer.score(images[:1].repeat(2, 1, 1, 1), [long, longer])["clip_score"]
    assert scores[0] == pytest.approx(float(scores[1]))


def test_a_checkpoint_that_cannot_be_loaded_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        open_scorer(f"clip_score:{tmp_path / 'no'}")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("beauty", "unknown scorer 'beauty'; known: .*emoji"),
        ("clip_score", "scorer clip_score: give a checkpoint, as in clip_score:PATH_OR_HUB_ID"),
    ],
)
def test_a_wrong_scorer_is_one_line(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_scorer(spec)


class NeedsWeights:
    name = "needs-weights"

    def __init__(self, weights: str) -> None:
        self.weights = weights


class OnDevice:
    name = "on-device"

    def __init__(self, *, device: torch.device | str) -> None:
        self.device = device


def test_default_scorers_are_all_that_need_no_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(open_scorers()) == ["emoji", "nearest_real"]
    monkeypatch.setitem(scorers._entries, "needs-weights", NeedsWeights)
    monkeypatch.setitem(scorers._entries, "on-device", OnDevice)
    opened = open_scorers(device="meta")
    assert list(opened) == ["emoji", "nearest_real", "on-device"]
    assert opened["on-device"].device == "meta"
    assert open_scorer("needs-weights:a/b").weights == "a/b"


def test_a_scorer_without_a_checkpoint_takes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(scorers._entries, "on-device", OnDevice)
    with pytest.raises(UserError, match="scorer on-device:x: it takes no checkpoint; write on-device"):
        open_scorer("on-device:x")
