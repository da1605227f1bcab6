"""The scorer nearest_real: real emoji, blurred ones, and the bundled gallery."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fewstep.atomic import write_tensors
from fewstep.emoji.dataset import BACKGROUNDS, EmojiDataset, EmojiSpec
from fewstep.emoji.nearest_real import GALLERY, NearestReal, gallery_specs
from fewstep.emoji.train_classifier import shrink
from fewstep.errors import UserError
from fewstep.evaluation.images import as_uint8


@pytest.fixture(scope="module")
def dataset() -> EmojiDataset:
    return EmojiDataset.load()


@pytest.fixture(scope="module")
def scorer() -> NearestReal:
    return NearestReal()


@pytest.fixture(scope="module")
def specs(dataset: EmojiDataset) -> list[EmojiSpec]:
    return dataset.sample(40, "test")


@pytest.fixture(scope="module")
def real(dataset: EmojiDataset, specs: list[EmojiSpec]) -> Tensor:
    return dataset.render(specs, torch.Generator().manual_seed(0))


def accuracy(scorer: NearestReal, images: Tensor, specs: list[EmojiSpec]) -> float:
    prompts = [scorer.dataset.prompt(spec, index % 3) for index, spec in enumerate(specs)]
    return float(scorer.score(as_uint8(images), prompts)["nearest_real_acc"].mean())


def test_real_images_are_right_and_blurred_ones_are_not(
    scorer: NearestReal, specs: list[EmojiSpec], real: Tensor
) -> None:
    assert accuracy(scorer, real, specs) > 0.95
    assert accuracy(scorer, shrink(real, 16), specs) < 0.6
    assert accuracy(scorer, real.roll(1, 0), specs) < 0.1


def test_prompts_of_no_emoji_have_no_score(scorer: NearestReal, specs: list[EmojiSpec], real: Tensor) -> None:
    prompts = [scorer.dataset.prompt(specs[0]), "a cat", scorer.dataset.prompt(specs[2])]
    scores = scorer.score(as_uint8(real[:3]), prompts)["nearest_real_acc"]
    assert scores.isnan().tolist() == [False, True, False]
    assert [scorer.group(prompt) is None for prompt in prompts] == [False, True, False]


def test_bundled_gallery_is_that_of_the_dataset_and_network(scorer: NearestReal, dataset: EmojiDataset) -> None:
    for background, rows in (("white", [0, 129]), ("purple", [130, 259])):
        drawings = [gallery_specs(dataset, background)[row] for row in rows]
        computed = scorer.network(dataset.render(drawings, jitter=False))
        torch.testing.assert_close(scorer.gallery[background][rows], computed, atol=2e-2, rtol=2e-2)


def test_a_gallery_of_another_dataset_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "gallery.safetensors"
    with pytest.raises(UserError, match="cannot be read"):
        NearestReal(file)
    write_tensors(file, load_file(GALLERY), {"network": "open-nsfw", "objects": "1f34e"})
    with pytest.raises(UserError, match=r"is of another dataset; make it with `fewstep emoji gallery`"):
        NearestReal(file)
    assert set(load_file(GALLERY)) == set(BACKGROUNDS)
