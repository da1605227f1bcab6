"""The emoji dataset's files, built from packages."""

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from fewstep.emoji import build as emoji_build
from fewstep.errors import UserError


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
    codes = [code for code, _ in entries if code != "1f98a"]  # this set lacks the fox
    write_package(
        tmp_path, "emoji-datasource-twitter", {f"img/twitter/64/{code}.png": picture((0, 200, 0)) for code in codes}
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
    assert (counts["objects"], counts["core"]) == (2, 1)  # no flag, and no fox, which one set lacks
    objects = json.loads((tmp_path / "out" / "objects.json").read_text())
    assert [(item["en"], item["zh"], item["core"]) for item in objects] == [
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
