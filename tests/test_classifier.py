"""The emoji classifier: the bundled weights have the stated accuracy, and training works."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from fewstep.config.load import parse_recipe
from fewstep.emoji.classifier import (
    ACCURACIES,
    BUNDLED_CLASSIFIER,
    ClassifierNet,
    ClassifierOutput,
    EmojiClassifier,
    correct,
    labels,
)
from fewstep.emoji.dataset import STYLES, EmojiDataset
from fewstep.emoji.recipes import ClassifierRecipe
from fewstep.emoji.train_classifier import (
    accuracy,
    augment,
    batches,
    make_unrecognizable,
    random_backgrounds,
    shrink,
    splits,
    train,
)
from fewstep.errors import UserError
from fewstep.evaluation.images import as_uint8
from fewstep.training.run_dir import RunDir


@pytest.fixture(scope="module")
def dataset() -> EmojiDataset:
    return EmojiDataset.load()


def small_classifier(num_objects: int = 5) -> EmojiClassifier:
    torch.manual_seed(0)
    codes = [item.code for item in EmojiDataset.load(num_objects).objects]
    return EmojiClassifier(ClassifierNet(num_objects, 8), {"objects": codes, "base_channels": 8, "accuracy": {}})


def recipe(num_objects: int = 6, steps: int = 60) -> ClassifierRecipe:
    tree = {
        "kind": "classifier",
        "name": "test",
        "base_channels": 8,
        "data": {"num_objects": num_objects},
        "train": {"steps": steps, "batch_size": 24, "seed": 1, "num_threads": 1},
        "optim": {"lr": 5e-3, "ema_decay": 0.9},
    }
    parsed = parse_recipe(tree, "test")
    assert isinstance(parsed, ClassifierRecipe)
    return parsed


def test_bundled_classifier_has_its_stated_accuracy(dataset: EmojiDataset) -> None:
    classifier = EmojiClassifier.load()
    classifier.check_objects(dataset)
    _, held_out = splits(dataset)
    measured = accuracy(classifier, dataset, held_out[::4], placements=1)
    for key in ACCURACIES:
        assert classifier.accuracy[key] >= 0.98
        assert measured[key] == pytest.approx(classifier.accuracy[key], abs=0.03)
    assert (BUNDLED_CLASSIFIER / "classifier.safetensors").stat().st_size < 4 * 2**20


def test_held_out_images_are_no_training_images(dataset: EmojiDataset) -> None:
    seen, held_out = splits(dataset)
    images = [{(s.object, s.style, s.background) for s in specs} for specs in (seen, held_out)]
    assert not images[0] & images[1]
    assert len(images[0]) + len(images[1]) == len(dataset.objects) * len(STYLES) * 8
    assert {s.style for s in held_out} == set(STYLES)


def test_batches_depend_only_on_their_number(dataset: EmojiDataset) -> None:
    data = batches(dataset, splits(dataset)[0], recipe())
    first, again, other = data(3), data(3), data(4)
    assert torch.equal(first[0], again[0])
    assert first[1] == again[1]
    assert first[1] != other[1]
    assert first[0].min() >= 0
    assert first[0].max() <= 1


def test_random_backgrounds_keep_the_emoji(dataset: EmojiDataset) -> None:
    """Transparency is recovered exactly: the background is uniform and opaque pixels do not change."""
    specs = dataset.sample(16, styles=STYLES)
    images = random_backgrounds(dataset, specs, torch.Generator().manual_seed(3))
    white, black = (
        dataset.render([replace(s, background=color) for s in specs], torch.Generator().manual_seed(3))
        for color in ("white", "black")
    )
    opaque = (white - black).abs().amax(1, keepdim=True) < 1e-6
    assert opaque.float().mean() > 0.1
    assert ((images - white).abs() * opaque).max() < 1e-4
    corners = images[:, :, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners.std(2).amax(1) < 1e-4).float().mean() > 0.8
    assert corners.mean(2).std(0).min() > 0.1


def test_augmentation_keeps_the_background_recognizable() -> None:
    """Colors change, but the corner of a red image stays more red than blue."""
    red = torch.tensor([0.84, 0.22, 0.22])[None, :, None, None].expand(32, 3, 64, 64)
    corners = augment(red, torch.Generator().manual_seed(0))[:, :, :8, :8].mean((2, 3))
    assert (corners[:, 0] > corners[:, 2] + 0.2).all()


def test_prediction_is_independent_of_batch_and_format() -> None:
    classifier = small_classifier()
    images = torch.rand(5, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    together = classifier(images)
    assert torch.allclose(classifier(images[2:3]).object_style_logits, together.object_style_logits[2:3], atol=1e-5)
    pixels = as_uint8(images)
    assert torch.allclose(classifier(pixels).embedding, together.embedding, atol=0.05)
    assert classifier(torch.rand(2, 3, 96, 128)).object_logits.shape == (2, 5)
    assert classifier(images[:0]).background_logits.shape == (0, 8)


def test_correct_compares_predictions_with_labels(dataset: EmojiDataset) -> None:
    specs = dataset.sample(6, styles=STYLES)
    item, style, background = labels(specs)
    object_style = torch.zeros(6, len(dataset.objects), len(STYLES))
    object_style[torch.arange(6), item, style] = 9
    embedding = torch.zeros(6, 1)
    none = torch.full((6,), -9.0)
    right = correct(ClassifierOutput(object_style, torch.eye(8)[background], none, embedding), specs)
    assert list(right) == list(ACCURACIES)
    assert all(hits.all() for hits in right.values())
    wrong = correct(ClassifierOutput(object_style.roll(1, 1), torch.eye(8)[background], none, embedding), specs)
    assert not wrong["object_acc"].any()
    assert wrong["style_acc"].all()
    unclear = correct(ClassifierOutput(object_style, torch.eye(8)[background], -3 * none, embedding), specs)
    assert [bool(hits.any()) for hits in unclear.values()] == [False, False, True]


def test_accuracy_falls_with_blur(dataset: EmojiDataset) -> None:
    """As nearest_real does, and as a person's would."""
    classifier = EmojiClassifier.load()
    _, held_out = splits(dataset)
    found = [
        accuracy(classifier, dataset, held_out[::5], 1, partial(shrink, size=size))["object_acc"]
        for size in (32, 16, 8)
    ]
    assert found[0] > 0.95
    assert 0.1 < found[1] < 0.9
    assert found[2] < 0.1


def test_unrecognizable_images_are_of_six_kinds_and_in_range(dataset: EmojiDataset) -> None:
    images = dataset.render(dataset.sample(12), torch.Generator().manual_seed(0))
    changed = make_unrecognizable(images, torch.Generator().manual_seed(1))
    assert changed.shape == images.shape
    assert 0 <= changed.min() <= changed.max() <= 1
    assert ((changed - images).abs().flatten(1).mean(1) > 0.01).all()
    shuffled = changed[[3, 9]].flatten(2).sort(2).values
    torch.testing.assert_close(shuffled, images[[3, 9]].flatten(2).sort(2).values)  # the same pixels elsewhere


def test_training_saves_an_accurate_classifier(tmp_path: Path) -> None:
    with RunDir(tmp_path, recipe(steps=120)) as run:
        folder = train(recipe(steps=120), run)
    classifier = EmojiClassifier.load(folder)
    assert classifier.accuracy["background_acc"] > 0.3  # 1/8 by chance
    dataset = EmojiDataset.load(6)
    held_out = splits(dataset)[1]
    assert classifier.accuracy == accuracy(classifier, dataset, held_out)  # the saved weights are the measured ones
    assert classifier.accuracy["images"] == 4 * len(held_out)


def test_saved_classifier_loads_back(tmp_path: Path) -> None:
    small = small_classifier()
    small.save(tmp_path)
    loaded = EmojiClassifier.load(tmp_path)
    images = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(
        loaded(images).object_style_logits, small(images).object_style_logits, atol=0.02, rtol=0.02
    )
    assert loaded.description == small.description


def test_damaged_files_are_named_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"classifier\.safetensors is missing"):
        EmojiClassifier.load(tmp_path)
    small_classifier().save(tmp_path)
    EmojiClassifier.load(tmp_path)
    weights = tmp_path / "classifier.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:1000])
    with pytest.raises(UserError, match=r"classifier\.safetensors does not hold") as caught:
        EmojiClassifier.load(tmp_path)
    assert "\n" not in str(caught.value)
    weights.write_bytes(whole)
    (tmp_path / "classifier.json").write_text('{"objects": []}')
    with pytest.raises(UserError, match=r"classifier\.json"):
        EmojiClassifier.load(tmp_path)


def test_classifier_of_other_objects_is_refused(dataset: EmojiDataset) -> None:
    with pytest.raises(UserError, match="trained on 5 objects"):
        small_classifier().check_objects(dataset)
