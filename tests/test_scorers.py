"""Evaluation networks through transformers, on tiny random checkpoints: features and CLIP score."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import (
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
)

from fewstep.errors import UserError
from fewstep.evaluation.feature_networks import open_features, with_network
from fewstep.rewards.scorers import default_scorers, open_scorer

PROMPTS = ["a fox", "two boats", "a red apple"]


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(0, 256, (3, 40, 40, 3), dtype=torch.uint8)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of random weights: 28 px, two layers, a tokenizer of single letters."""
    folder = tmp_path_factory.mktemp("clip")
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    tokenizer = CLIPTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[])
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"vocab_size": len(words), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    text = tower | ids | {"max_position_embeddings": 24}
    config = CLIPConfig(
        text_config=text,
        vision_config=tower | {"image_size": 28, "patch_size": 14, "projection_dim": 8},
        projection_dim=8,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    size = {"shortest_edge": 28}
    CLIPProcessor(CLIPImageProcessor(size=size, crop_size={"height": 28, "width": 28}), tokenizer).save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dinov2")
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(folder)
    BitImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    return folder


def test_clip_features_are_its_image_embeddings(clip: Path, images: torch.Tensor) -> None:
    network = open_features(f"clip:{clip}")
    done: list[int] = []
    features = network(images, done.append)
    model = CLIPVisionModelWithProjection.from_pretrained(clip).eval()
    pixels = CLIPImageProcessor.from_pretrained(clip)([Image.fromarray(i.numpy()) for i in images], return_tensors="pt")
    with torch.no_grad():
        expected = model(**pixels).image_embeds
    torch.testing.assert_close(features, expected)
    assert (network.name, features.shape, sum(done)) == ("clip", (3, 8), 3)


def test_dinov2_features_are_its_class_token(dinov2: Path, images: torch.Tensor) -> None:
    features = open_features(f"dinov2:{dinov2}")(images)
    model = Dinov2Model.from_pretrained(dinov2).eval()
    pixels = BitImageProcessor.from_pretrained(dinov2)(
        [Image.fromarray(i.numpy()) for i in images], return_tensors="pt"
    )
    with torch.no_grad():
        expected = model(**pixels).last_hidden_state[:, 0]
    torch.testing.assert_close(features, expected)


def test_inception_names_the_package_that_it_needs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"needs timm; pip install timm|cannot be loaded as TimmWrapperModel"):
        open_features(f"inception:{tmp_path}")


def test_clip_score_is_the_cosine_of_image_and_prompt(clip: Path, images: torch.Tensor) -> None:
    scores = open_scorer(f"clip_score:{clip}").score(images, PROMPTS)["clip_score"]
    model, processor = CLIPModel.from_pretrained(clip).eval(), CLIPProcessor.from_pretrained(clip)
    pictures = [Image.fromarray(image.numpy()) for image in images]
    with torch.no_grad():
        out = model(**processor(text=PROMPTS, images=pictures, return_tensors="pt", padding=True))
    expected = 100 * torch.cosine_similarity(out.image_embeds, out.text_embeds).clamp(min=0)
    torch.testing.assert_close(scores, expected)
    assert scores.shape == (3,)


def test_checkpoints_that_cannot_be_loaded_are_one_line(tmp_path: Path, dinov2: Path) -> None:
    for open_it in (lambda: open_features(f"clip:{tmp_path}"), lambda: open_scorer(f"clip_score:{tmp_path / 'no'}")):
        with pytest.raises(UserError) as refused:
            open_it()
        assert "\n" not in str(refused.value)
    (dinov2_without_weights := tmp_path / "bare").mkdir()
    (dinov2_without_weights / "config.json").write_text((dinov2 / "config.json").read_text())
    with pytest.raises(UserError, match="cannot be loaded as Dinov2Model"):
        open_features(f"dinov2:{dinov2_without_weights}")


def test_default_scorers_need_no_checkpoint() -> None:
    assert [scorer.name for scorer in default_scorers()] == ["emoji"]


def test_keys_carry_the_networks_name() -> None:
    assert with_network("fd_teacher", "dinov2") == "fd_teacher[dinov2]"
