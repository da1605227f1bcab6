"""The judge: what ships is as good as it says, and training one works."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fewstep.data.emoji import STYLES, EmojiWorld
from fewstep.errors import UserError
from fewstep.evaluate.images import as_uint8
from fewstep.evaluate.judge import SHIPPED, Judge, JudgeNet, hits, labels
from fewstep.evaluate.train_judge import accuracy, anywhere, augment, batches, splits, train
from fewstep.recipes.load import parse_recipe
from fewstep.recipes.schema import JudgeRecipe
from fewstep.training.run import Run


@pytest.fixture(scope="module")
def world() -> EmojiWorld:
    return EmojiWorld.load()


def small_judge(things: int = 5) -> Judge:
    torch.manual_seed(0)
    card = {"things": [thing.code for thing in EmojiWorld.load(things).things], "width": 8, "accuracy": {}}
    return Judge(JudgeNet(things, 8), card)


def recipe(things: int = 6, steps: int = 60) -> JudgeRecipe:
    tree = {
        "kind": "judge",
        "name": "test",
        "width": 8,
        "data": {"things": things},
        "train": {"steps": steps, "batch_size": 24, "seed": 1, "threads": 1},
        "optim": {"lr": 5e-3, "ema": 0.9},
    }
    parsed = parse_recipe(tree, "test")
    assert isinstance(parsed, JudgeRecipe)
    return parsed


def test_the_shipped_judge_is_as_good_as_it_says(world: EmojiWorld) -> None:
    judge = Judge.load()
    judge.check_world(world)
    _, held_out = splits(world)
    measured = accuracy(judge, world, held_out[::4], placements=1)
    for key in ("name_top1", "style_top1", "colour_top1"):
        assert judge.accuracy[key] >= 0.98
        assert measured[key] == pytest.approx(judge.accuracy[key], abs=0.03)
    assert (SHIPPED / "judge.safetensors").stat().st_size < 4 * 2**20


def test_held_out_combinations_are_in_no_training_image(world: EmojiWorld) -> None:
    known, held_out = splits(world)
    triples = [{(c.thing, c.style, c.colour) for c in concepts} for concepts in (known, held_out)]
    assert not triples[0] & triples[1]
    assert len(triples[0]) + len(triples[1]) == len(world.things) * len(STYLES) * 8
    assert {c.style for c in held_out} == set(STYLES)


def test_batches_depend_on_their_number_alone(world: EmojiWorld) -> None:
    data = batches(world, splits(world)[0], recipe())
    first, again, other = data(3), data(3), data(4)
    assert torch.equal(first[0], again[0])
    assert first[1] == again[1]
    assert first[1] != other[1]
    assert first[0].min() >= 0
    assert first[0].max() <= 1


def test_any_drawing_on_any_background(world: EmojiWorld) -> None:
    """Transparency is recovered exactly: bare background is plain, and what is opaque stays as it was."""
    concepts = world.sample(16, "all", styles=STYLES)
    images = anywhere(world, concepts, torch.Generator().manual_seed(3))
    white, black = (
        world.render([replace(c, colour=colour) for c in concepts], torch.Generator().manual_seed(3))
        for colour in ("white", "black")
    )
    opaque = (white - black).abs().amax(1, keepdim=True) < 1e-6
    assert opaque.float().mean() > 0.1
    assert ((images - white).abs() * opaque).max() < 1e-4
    corners = images[:, :, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners.std(2).amax(1) < 1e-4).float().mean() > 0.8
    assert corners.mean(2).std(0).min() > 0.1


def test_augmentation_keeps_the_background_what_it_is(world: EmojiWorld) -> None:
    """Colours may wander, but the corner of a red image stays redder than blue."""
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
    assert judge(images[:0]).colour_logits.shape == (0, 8)


def test_hits_compare_with_the_concepts_labels(world: EmojiWorld) -> None:
    concepts = world.sample(6, "all", styles=STYLES)
    name, style, colour = labels(concepts)
    output = small_judge()(torch.rand(6, 3, 64, 64))
    drawing = torch.zeros(6, len(world.things), len(STYLES))
    drawing[torch.arange(6), name, style] = 9
    right = hits(type(output)(drawing, torch.eye(8)[colour], output.embedding), concepts)
    assert all(hit.all() for hit in right.values())
    wrong = hits(type(output)(drawing.roll(1, 1), torch.eye(8)[colour], output.embedding), concepts)
    assert not wrong["name_top1"].any()
    assert wrong["style_top1"].all()


def test_training_learns_measures_itself_and_saves(tmp_path: Path) -> None:
    with Run(tmp_path, recipe()) as run:
        judge = train(recipe(), run)
    assert judge.accuracy["colour_top1"] > 0.3  # 1/8 by chance
    assert judge.accuracy["images"] > 0
    loaded = Judge.load(tmp_path / "model")
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(loaded(images).drawing_logits, judge(images).drawing_logits)
    assert loaded.card == judge.card


def test_broken_files_are_named_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"judge\.safetensors is missing"):
        Judge.load(tmp_path)
    small_judge().save(tmp_path)
    Judge.load(tmp_path)
    weights = tmp_path / "judge.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:1000])
    with pytest.raises(UserError, match=r"judge\.safetensors does not hold") as caught:
        Judge.load(tmp_path)
    assert "\n" not in str(caught.value)
    weights.write_bytes(whole)
    (tmp_path / "judge.json").write_text('{"things": []}')
    with pytest.raises(UserError, match=r"judge\.json"):
        Judge.load(tmp_path)


def test_a_judge_of_another_world_is_refused(world: EmojiWorld) -> None:
    with pytest.raises(UserError, match="5 things"):
        small_judge().check_world(world)
