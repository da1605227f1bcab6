"""The judge: what ships is as good as it says, and training one works."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fewstep.config.load import parse_recipe
from fewstep.emoji.classifier import BUNDLED_CLASSIFIER, ClassifierNet, EmojiClassifier, correct, labels
from fewstep.emoji.dataset import STYLES, EmojiDataset
from fewstep.emoji.recipes import ClassifierRecipe
from fewstep.emoji.train_classifier import accuracy, augment, batches, random_backgrounds, splits, train
from fewstep.errors import UserError
from fewstep.evaluation.images import as_uint8
from fewstep.training.run_dir import RunDir


@pytest.fixture(scope="module")
def world() -> EmojiDataset:
    return EmojiDataset.load()


def small_judge(things: int = 5) -> EmojiClassifier:
    torch.manual_seed(0)
    card = {"things": [thing.code for thing in EmojiDataset.load(things).things], "width": 8, "accuracy": {}}
    return EmojiClassifier(ClassifierNet(things, 8), card)


def recipe(things: int = 6, steps: int = 60) -> ClassifierRecipe:
    tree = {
        "kind": "classifier",
        "name": "test",
        "width": 8,
        "data": {"things": things},
        "train": {"steps": steps, "batch_size": 24, "seed": 1, "num_threads": 1},
        "optim": {"lr": 5e-3, "ema_decay": 0.9},
    }
    parsed = parse_recipe(tree, "test")
    assert isinstance(parsed, ClassifierRecipe)
    return parsed


def test_the_shipped_judge_is_as_good_as_it_says(world: EmojiDataset) -> None:
    judge = EmojiClassifier.load()
    judge.check_world(world)
    _, held_out = splits(world)
    measured = accuracy(judge, world, held_out[::4], placements=1)
    for key in ("name_top1", "style_top1", "color_top1"):
        assert judge.accuracy[key] >= 0.98
        assert measured[key] == pytest.approx(judge.accuracy[key], abs=0.03)
    assert (BUNDLED_CLASSIFIER / "judge.safetensors").stat().st_size < 4 * 2**20


def test_held_out_combinations_are_in_no_training_image(world: EmojiDataset) -> None:
    known, held_out = splits(world)
    triples = [{(c.thing, c.style, c.color) for c in concepts} for concepts in (known, held_out)]
    assert not triples[0] & triples[1]
    assert len(triples[0]) + len(triples[1]) == len(world.things) * len(STYLES) * 8
    assert {c.style for c in held_out} == set(STYLES)


def test_batches_depend_on_their_number_alone(world: EmojiDataset) -> None:
    data = batches(world, splits(world)[0], recipe())
    first, again, other = data(3), data(3), data(4)
    assert torch.equal(first[0], again[0])
    assert first[1] == again[1]
    assert first[1] != other[1]
    assert first[0].min() >= 0
    assert first[0].max() <= 1


def test_any_drawing_on_any_background(world: EmojiDataset) -> None:
    """Transparency is recovered exactly: bare background is plain, and what is opaque stays as it was."""
    concepts = world.sample(16, "all", styles=STYLES)
    images = random_backgrounds(world, concepts, torch.Generator().manual_seed(3))
    white, black = (
        world.render([replace(c, color=color) for c in concepts], torch.Generator().manual_seed(3))
        for color in ("white", "black")
    )
    opaque = (white - black).abs().amax(1, keepdim=True) < 1e-6
    assert opaque.float().mean() > 0.1
    assert ((images - white).abs() * opaque).max() < 1e-4
    corners = images[:, :, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners.std(2).amax(1) < 1e-4).float().mean() > 0.8
    assert corners.mean(2).std(0).min() > 0.1


def test_augmentation_keeps_the_background_what_it_is(world: EmojiDataset) -> None:
    """Colors may wander, but the corner of a red image stays redder than blue."""
    red = torch.tensor([0.84, 0.22, 0.22])[None, :, None, None].expand(32, 3, 64, 64)
    corners = augment(red, torch.Generator().manual_seed(0))[:, :, :8, :8].mean((2, 3))
    assert (corners[:, 0] > corners[:, 2] + 0.2).all()


def test_an_image_is_judged_the_same_in_any_company_and_either_form() -> None:
    judge = small_judge()
    images = torch.rand(5, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    together = judge(images)
    assert torch.allclose(judge(images[2:3]).drawing_logits, together.drawing_logits[2:3], atol=1e-5)
    pixels = as_uint8(images)
    assert torch.allclose(judge(pixels).embedding, together.embedding, atol=0.05)
    assert judge(torch.rand(2, 3, 96, 128)).name_logits.shape == (2, 5)
    assert judge(images[:0]).color_logits.shape == (0, 8)


def test_hits_compare_with_the_concepts_labels(world: EmojiDataset) -> None:
    concepts = world.sample(6, "all", styles=STYLES)
    name, style, color = labels(concepts)
    output = small_judge()(torch.rand(6, 3, 64, 64))
    drawing = torch.zeros(6, len(world.things), len(STYLES))
    drawing[torch.arange(6), name, style] = 9
    right = correct(type(output)(drawing, torch.eye(8)[color], output.embedding), concepts)
    assert all(hit.all() for hit in right.values())
    wrong = correct(type(output)(drawing.roll(1, 1), torch.eye(8)[color], output.embedding), concepts)
    assert not wrong["name_top1"].any()
    assert wrong["style_top1"].all()


def test_training_learns_measures_itself_and_saves(tmp_path: Path) -> None:
    with RunDir(tmp_path, recipe()) as run:
        judge = train(recipe(), run)
    assert judge.accuracy["color_top1"] > 0.3  # 1/8 by chance
    assert judge.accuracy["images"] > 0
    loaded = EmojiClassifier.load(tmp_path / "model")
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(loaded(images).drawing_logits, judge(images).drawing_logits)
    assert loaded.card == judge.card


def test_broken_files_are_named_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"judge\.safetensors is missing"):
        EmojiClassifier.load(tmp_path)
    small_judge().save(tmp_path)
    EmojiClassifier.load(tmp_path)
    weights = tmp_path / "judge.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:1000])
    with pytest.raises(UserError, match=r"judge\.safetensors does not hold") as caught:
        EmojiClassifier.load(tmp_path)
    assert "\n" not in str(caught.value)
    weights.write_bytes(whole)
    (tmp_path / "judge.json").write_text('{"things": []}')
    with pytest.raises(UserError, match=r"judge\.json"):
        EmojiClassifier.load(tmp_path)


def test_a_judge_of_another_world_is_refused(world: EmojiDataset) -> None:
    with pytest.raises(UserError, match="5 things"):
        small_judge().check_world(world)
