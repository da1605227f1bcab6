"""The emoji dataset: names, prompts, splits, images, and the plug-in's prompt source, image source and scorer."""

import json
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fewstep.config.sections import PromptSettings
from fewstep.core.registry import image_sources, load_plugins, scorers
from fewstep.data.prompts import open_prompts
from fewstep.emoji import build as emoji_build
from fewstep.emoji import model_card, publish, teacher_quality
from fewstep.emoji.dataset import (
    ASSETS,
    BACKGROUNDS,
    NUM_TEMPLATES,
    STYLES,
    TEACHER_STYLES,
    TEMPLATES,
    EmojiDataset,
    EmojiSpec,
    with_article,
)
from fewstep.emoji.scorer import EmojiScorer
from fewstep.errors import UserError
from fewstep.evaluation.images import as_uint8
from fewstep.models.pipeline import load

PROMPT = "a noto emoji of a red apple on a blue background"


@pytest.fixture(scope="module")
def dataset() -> EmojiDataset:
    return EmojiDataset.load()


def test_size_and_names(dataset):
    objects = dataset.objects
    assert len(objects) == len(emoji_build.core_names()) >= 100
    assert len(EmojiDataset.load_all().objects) > 1000
    assert len({item.en for item in objects}) == len({item.zh for item in objects}) == len(objects)
    assert sum(file.stat().st_size for file in ASSETS.iterdir()) < 25e6
    apple = next(item for item in objects if item.en == "red apple")
    assert (apple.code, apple.zh) == ("1f34e", "红苹果")


def test_prompts_name_object_style_and_background(dataset):
    apple = next(item.index for item in dataset.objects if item.en == "red apple")
    assert dataset.prompt(EmojiSpec(apple, "noto", "blue", "en")) == PROMPT
    assert dataset.prompt(EmojiSpec(apple, "twemoji", "blue", "zh")) == "蓝色背景上的红苹果，twemoji 风格"
    assert all(len(templates) == NUM_TEMPLATES for templates in TEMPLATES.values())


def test_parse_is_the_inverse_of_prompt(dataset):
    for spec in dataset.specs(styles=STYLES)[::7]:
        for template in range(NUM_TEMPLATES):
            assert dataset.parse(dataset.prompt(spec, template)) == spec
    for other in (
        "a cat",
        "",
        "a noto emoji of a red sofa on a blue background",
        "a noto emoji of a fox on a beige background",
    ):
        assert dataset.parse(other) is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("red apple", "a red apple"),
        ("octopus", "an octopus"),
        ("unicorn", "a unicorn"),
        ("jeans", "jeans"),
        ("bus", "a bus"),
    ],
)
def test_articles(name, expected):
    assert with_article(name) == expected


def test_training_split_covers_every_object_style_and_background(dataset):
    train = dataset.specs("train")
    assert {s.object for s in train} == {item.index for item in dataset.objects}
    assert {(s.object, s.style) for s in train} == {(s.object, s.style) for s in dataset.specs()}
    assert {s.background for s in train} == set(BACKGROUNDS)
    assert all(s.style in TEACHER_STYLES for s in dataset.specs())


def test_splits_are_disjoint_and_complete(dataset):
    train, validation, test = (set(dataset.specs(split)) for split in ("train", "validation", "test"))
    assert not train & validation
    assert not train & test
    assert not validation & test
    assert train | validation | test == set(dataset.specs())
    assert min(len(validation), len(test)) > 300
    # validation and test share no image either, in whatever language
    images = [{(s.object, s.style, s.background) for s in specs} for specs in (validation, test)]
    assert not images[0] & images[1]
    # most held-out images are in no training prompt of either language
    seen = {(s.object, s.style, s.background) for s in train}
    held_out = validation | test
    assert len([s for s in held_out if (s.object, s.style, s.background) not in seen]) > 0.6 * len(held_out)


def test_sample_is_determined_by_its_seed(dataset):
    assert dataset.sample(20, "test", seed=1) == dataset.sample(20, "test", seed=1)
    assert dataset.sample(20, "test", seed=1) != dataset.sample(20, "test", seed=2)
    assert dataset.sample(20, "test", seed=1) == dataset.sample(40, "test", seed=1)[:20]


def test_render(dataset):
    spec = EmojiSpec(0, "noto", "green", "en")
    plain = dataset.render([spec], jitter=False)
    assert plain.shape == (1, 3, 64, 64)
    assert 0 <= plain.min() <= plain.max() <= 1
    green = torch.tensor(BACKGROUNDS["green"]) / 255
    torch.testing.assert_close(plain[0, :, 0, 0], green)
    assert (plain[0, :, 32, 32] - green).abs().max() > 0.1  # the emoji covers the center
    generator = torch.Generator().manual_seed(0)
    jittered = dataset.render([spec] * 2, generator)
    assert not torch.equal(jittered[0], jittered[1])
    assert torch.equal(jittered, dataset.render([spec] * 2, torch.Generator().manual_seed(0)))
    # within the placements: the outermost columns are background, and most of the center is emoji
    many = dataset.render([EmojiSpec(0, "noto", "white", "en")] * 64, torch.Generator().manual_seed(0))
    assert (many[..., 0] - many[..., :1, 0]).abs().max() < 0.02
    others = dataset.render([EmojiSpec(0, style, "green", "en") for style in STYLES], jitter=False)
    assert (others[0] - others[1]).abs().mean() > 0.01
    assert (others[1] - others[2]).abs().mean() > 0.01


# --- the plug-in -------------------------------------------------------------------------------------------------


def test_importing_the_plugin_imports_neither_torch_nor_pydantic():
    program = "import sys, fewstep.emoji; assert not {'torch', 'pydantic'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_prompt_source_has_disjoint_splits(dataset):
    source = open_prompts(PromptSettings(source="emoji"))
    texts = {split: list(source.texts(split)) for split in ("train", "validation", "test")}
    assert all(len(set(part)) == len(part) for part in texts.values())
    assert len(set().union(*texts.values())) == sum(len(part) for part in texts.values())
    assert texts["train"][:2] == [dataset.prompt(dataset.specs("train")[0], template) for template in (0, 1)]
    assert len(texts["train"]) == NUM_TEMPLATES * len(dataset.specs("train"))
    for split in ("validation", "test"):
        count = len(dataset.specs(split))
        assert {dataset.parse(text) for text in texts[split][:count]} == set(dataset.specs(split))
        assert len(texts[split]) == NUM_TEMPLATES * count


def test_prompt_source_refuses_files_of_held_out_prompts():
    with pytest.raises(UserError, match=r"prompts\.test_source: .*leave test_source null"):
        open_prompts(PromptSettings(source="emoji", test_source="prompts.txt"))


def test_image_source_renders_the_prompts(dataset):
    load_plugins()
    images = image_sources.get("emoji")()
    assert images.knows(PROMPT)
    assert not images.knows("a photo of a cat")
    prompts = [PROMPT, "蓝色背景上的红苹果，twemoji 风格"]
    rendered = images.render(prompts, torch.Generator().manual_seed(5), 32)
    specs = [dataset.parse(prompt) for prompt in prompts]
    assert torch.equal(rendered, dataset.render(specs, torch.Generator().manual_seed(5), 32))
    with pytest.raises(UserError, match="no image of 'a photo of a cat'"):
        images.render(["a photo of a cat"], None, 32)


def test_scorer_scores_real_images_of_its_prompts(dataset):
    load_plugins()
    scorer = scorers.get("emoji")()
    assert scorer.name == "emoji"
    specs = dataset.sample(24, "test")
    images = as_uint8(dataset.render(specs, torch.Generator().manual_seed(0)))
    prompts = [dataset.prompt(spec) for spec in specs]
    scores = scorer.score(images, prompts)
    assert list(scores) == ["object_acc", "style_acc", "background_acc"]
    assert all(score.shape == (24,) and score.mean() > 0.9 for score in scores.values())
    wrong = scorer.score(images.roll(1, 0), prompts)
    assert wrong["object_acc"].mean() < 0.2
    names = [dataset.objects[spec.object].en for spec in specs]
    predicted = scorer.predictions(images)
    assert [name == expected for name, expected in zip(predicted, names, strict=True)] == scores[
        "object_acc"
    ].bool().tolist()
    assert scorer.accuracy["object_acc"] > 0.98
    assert [scorer.group(prompt) for prompt in prompts] == [spec.language for spec in specs]


def test_scorer_gives_nan_for_other_prompts():
    scores = EmojiScorer().score(torch.zeros(3, 64, 64, 3, dtype=torch.uint8), ["a cat", PROMPT, "a dog"])
    assert [score.isnan().tolist() for score in scores.values()] == [[True, False, True]] * 3
    none = EmojiScorer().score(torch.zeros(1, 64, 64, 3, dtype=torch.uint8), ["a cat"])
    assert none["object_acc"].isnan().all()


@pytest.mark.slow
def test_publish_writes_weights_card_and_quality(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_quality, "STEPS", 2)
    monkeypatch.setattr(model_card, "STEPS", 2)
    monkeypatch.setattr(model_card, "GRID_IMAGES", 4)
    stages = [tmp_path / "first", tmp_path / "second"]
    for stage in stages:
        stage.mkdir()
        lines = [{"step": step, "seconds": 60.0 * step, "teacher/loss": 1.0} for step in (1, 2)]
        (stage / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (stage / "recipe.yaml").write_text(f"name: {stage.name}\ntrain: {{batch_size: 4}}\n")
    tiny.save(stages[1] / "model")
    section = publish.publish(stages, tmp_path / "out", prompts=2)
    quality = json.loads((tmp_path / "out" / "quality.json").read_text())
    assert list(quality["by_split"]) == ["train, en", "train, zh", "test, en", "test, zh"]
    compared = quality["compared"]
    assert list(compared)[2:] == ["2 steps", "2 steps, no guidance", "4 steps", "4 steps, no guidance"]
    assert compared["real images"]["nearest_real_acc"] == 1
    assert compared["real images"]["fd_real"] < compared["real images, encoded and decoded"]["fd_real"]
    assert compared["real images"]["sharpness"] == pytest.approx(1, abs=0.5)
    tried = quality["guidance"]
    assert [row["guidance_scale"] for row in tried] == list(teacher_quality.GUIDANCE_SCALES)
    best = max(tried, key=lambda row: row["object_acc"] + row["nearest_real_acc"])["guidance_scale"]
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert section in card
    assert f"2 steps, guidance_scale {best:g}, 2 prompts per row" in card
    assert "Flow matching in 2 stages, 4 minutes in all" in card
    assert "| `second` | 2 | 4 | 2 |" in card
    with Image.open(tmp_path / "out" / "samples.png") as shown:
        assert shown.size == (8 * 66 - 2, 64)  # four pairs
    assert load(tmp_path / "out").generation_config.guidance_scale == best
    weights = load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}


# --- the build command, on small packages ------------------------------------------------------------------------
