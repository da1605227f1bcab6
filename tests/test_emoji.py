"""The emoji world: names, prompts, splits, images, and the script that builds it."""

import io
import json
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from fewstep.emoji import build as emoji_build
from fewstep.emoji.dataset import (
    ASSETS,
    COLORS,
    STYLES,
    TEACHER_STYLES,
    TEMPLATES,
    EmojiDataset,
    EmojiSpec,
    with_article,
)
from fewstep.errors import UserError


@pytest.fixture(scope="module")
def world() -> EmojiDataset:
    return EmojiDataset.load()


def test_size_and_names(world):
    assert len(world.things) == len(emoji_build.core_names()) >= 100
    assert len(EmojiDataset.everything().things) > 1000
    assert len({thing.en for thing in world.things}) == len({thing.zh for thing in world.things}) == len(world.things)
    assert sum(file.stat().st_size for file in ASSETS.iterdir()) < 25e6
    apple = next(thing for thing in world.things if thing.en == "red apple")
    assert (apple.code, apple.zh) == ("1f34e", "红苹果")


def test_prompts_of_the_design(world):
    apple = next(thing.index for thing in world.things if thing.en == "red apple")
    assert world.prompt(EmojiSpec(apple, "noto", "blue", "en")) == "a noto emoji of a red apple on a blue background"
    assert world.prompt(EmojiSpec(apple, "twemoji", "blue", "zh")) == "蓝色背景上的红苹果，twemoji 风格"


def test_parse_is_the_inverse_of_prompt(world):
    for concept in world.concepts("all", STYLES)[::7]:
        for wording in range(len(TEMPLATES[concept.language])):
            assert world.parse(world.prompt(concept, wording)) == concept
    for other in (
        "a cat",
        "",
        "a noto emoji of a red sofa on a blue background",
        "a noto emoji of a fox on a beige background",
    ):
        assert world.parse(other) is None


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


def test_splits(world):
    train, heldout = set(world.concepts("train")), set(world.concepts("heldout"))
    assert not train & heldout
    assert train | heldout == set(world.concepts("all"))
    assert len(heldout) >= 500
    # every thing, style, color and language is seen in training, so that what is held out are combinations alone
    assert {c.thing for c in train} == {thing.index for thing in world.things}
    assert {(c.thing, c.style) for c in train} == {(c.thing, c.style) for c in world.concepts("all")}
    assert {c.color for c in train} == set(COLORS)
    # most held-out drawings are unseen in both languages
    seen = {(c.thing, c.style, c.color) for c in train}
    unseen = [c for c in heldout if (c.thing, c.style, c.color) not in seen]
    assert len(unseen) > 0.6 * len(heldout)
    assert all(c.style in TEACHER_STYLES for c in train | heldout)


def test_sample_is_fixed_by_its_seed(world):
    assert world.sample(20, "heldout", seed=1) == world.sample(20, "heldout", seed=1)
    assert world.sample(20, "heldout", seed=1) != world.sample(20, "heldout", seed=2)
    assert world.sample(20, "heldout", seed=1) == world.sample(40, "heldout", seed=1)[:20]


def test_render(world):
    concept = EmojiSpec(0, "noto", "green", "en")
    plain = world.render([concept], jitter=False)
    assert plain.shape == (1, 3, 64, 64)
    assert 0 <= plain.min() <= plain.max() <= 1
    green = torch.tensor(COLORS["green"]) / 255
    torch.testing.assert_close(plain[0, :, 0, 0], green)
    assert (plain[0, :, 32, 32] - green).abs().max() > 0.1  # something is drawn there
    generator = torch.Generator().manual_seed(0)
    jittered = world.render([concept] * 2, generator)
    assert not torch.equal(jittered[0], jittered[1])
    assert torch.equal(jittered, world.render([concept] * 2, torch.Generator().manual_seed(0)))
    others = world.render([EmojiSpec(0, style, "green", "en") for style in STYLES], jitter=False)
    assert (others[0] - others[1]).abs().mean() > 0.01
    assert (others[1] - others[2]).abs().mean() > 0.01


# --- the build script, on packages made here ---------------------------------------------------------------------


def write_package(folder: Path, name: str, files: dict[str, bytes]) -> None:
    archive = folder / f"{name.lstrip('@').replace('/', '-')}-{emoji_build.PACKAGES[name]}.tgz"
    with tarfile.open(archive, "w:gz") as out:
        for path, content in files.items():
            entry = tarfile.TarInfo(f"package/{path}")
            entry.size = len(content)
            out.addfile(entry, io.BytesIO(content))


def picture(color: tuple[int, int, int], size: int = 64, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGBA", (size, size), (*color, 255)).save(buffer, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return buffer.getvalue()


@pytest.fixture
def packages(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(emoji_build, "CORE", "red apple")
    entries = [
        ("1f34e", "Food & Drink"),
        ("1f30b", "Travel & Places"),
        ("1f1e6", "Flags"),
        ("1f98a", "Animals & Nature"),
    ]
    listing = [{"image": f"{code}.png", "sort_order": n, "category": group} for n, (code, group) in enumerate(entries)]
    names = {"🍎": ("red apple", "红苹果"), "🌋": ("volcano", "火山"), "🇦": ("flag", "旗"), "🦊": ("fox", "狐狸")}
    write_package(
        tmp_path,
        "emoji-datasource-google",
        {"emoji.json": json.dumps(listing).encode()}
        | {f"img/google/64/{code}.png": picture((200, 0, 0)) for code, _ in entries},
    )
    drawn = [code for code, _ in entries if code != "1f98a"]  # one set lacks the fox
    write_package(
        tmp_path, "emoji-datasource-twitter", {f"img/twitter/64/{code}.png": picture((0, 200, 0)) for code in drawn}
    )
    write_package(
        tmp_path,
        "@lobehub/fluent-emoji-3d",
        {f"assets/{code}.webp": picture((0, 0, 200), 256, "WEBP") for code, _ in entries},
    )
    annotations = {
        f"annotations/{language}/annotations.json": json.dumps(
            {"annotations": {"annotations": {text: {"tts": [pair[n]]} for text, pair in names.items()}}}
        ).encode()
        for n, language in enumerate(("en", "zh"))
    }
    write_package(tmp_path, "cldr-annotations-full", annotations)
    return tmp_path


def test_build(packages, tmp_path):
    counts = emoji_build.build(tmp_path / "out", packages)
    assert (counts["things"], counts["core"]) == (2, 1)  # no flag, and no fox, which one set lacks
    things = json.loads((tmp_path / "out" / "things.json").read_text())
    assert [(t["en"], t["zh"], t["core"]) for t in things] == [
        ("red apple", "红苹果", True),
        ("volcano", "火山", False),
    ]
    with Image.open(tmp_path / "out" / "fluent.webp") as sheet:
        assert sheet.size == (40 * 64, 64)
        assert sheet.convert("RGBA").getpixel((70, 5)) == (0, 0, 200, 255)
        assert sheet.convert("RGBA").getpixel((140, 5))[3] == 0
    emoji_build.build(tmp_path / "again", packages)
    for file in (tmp_path / "out").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_build_names_a_missing_package(packages, tmp_path):
    next(packages.glob("cldr*.tgz")).unlink()
    with pytest.raises(UserError, match=r"cldr-annotations-full-[\d.]+\.tgz is missing"):
        emoji_build.build(tmp_path / "out", packages)
