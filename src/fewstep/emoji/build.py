"""Builds the files of the emoji dataset from public npm packages (``fewstep emoji build``).

Input: four packages with the images of three emoji sets and the English and Chinese names of the Unicode CLDR. Output:
one lossless WebP sheet per set (64 px RGBA tiles) and ``objects.json``. The same packages give the same bytes.
"""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
import tempfile
from pathlib import Path

from PIL import Image

from fewstep.atomic import atomic_file, write_text
from fewstep.errors import UserError
from fewstep.machine import reading
from fewstep.outputs import check_folder

PACKAGES = {
    "emoji-datasource-google": "16.0.0",
    "emoji-datasource-twitter": "16.0.0",
    "@lobehub/fluent-emoji-3d": "1.1.0",
    "cldr-annotations-full": "48.2.0",
}
TILE = 64
COLUMNS = 40
EXCLUDED_CATEGORIES = {"Flags", "Component", "People & Body"}

#: Objects that are easy to tell apart at 64 px in all sets. The micro teacher and the classifier are trained on these.
CORE = """
red apple, banana, watermelon, grapes, lemon, pineapple, strawberry, cherries, peach, pear, tomato, eggplant, carrot,
ear of corn, broccoli, mushroom, avocado, croissant, pretzel, cheese wedge, hamburger, french fries, pizza, hot dog,
doughnut, cookie, birthday cake, lollipop, ice cream, popcorn,
dog face, cat face, fox, lion, panda, pig face, frog, monkey face, rabbit face, koala, cow face, penguin, owl,
baby chick, flamingo, turtle, snake, spouting whale, dolphin, tropical fish, octopus, crab, snail, butterfly, honeybee,
lady beetle, spider, elephant, unicorn, shark,
rose, sunflower, tulip, cactus, evergreen tree, palm tree, maple leaf, four leaf clover, cherry blossom, seedling,
automobile, bus, tractor, bicycle, rocket, airplane, helicopter, sailboat, locomotive, flying saucer,
sun, crescent moon, star, cloud, rainbow, snowflake, fire, droplet, high voltage, ringed planet,
umbrella, balloon, wrapped gift, Christmas tree, jack-o-lantern, trophy, soccer ball, basketball, game die, guitar,
trumpet, drum, bell, key, light bulb, candle, camera, alarm clock, scissors, hammer, anchor, crown, top hat, gem stone,
necktie, jeans, glasses, books, envelope, telephone, bomb, magnet, locked, red heart, ghost, skull, alien, robot,
house, teddy bear
"""


def core_names() -> list[str]:
    """The names of the core objects, in their order."""
    return [name.strip() for name in CORE.replace("\n", " ").split(",")]


def download(packages: Path) -> None:
    """Fetch the pinned packages with ``npm pack`` into ``packages``."""
    packages.mkdir(parents=True, exist_ok=True)
    specifiers = [f"{name}@{version}" for name, version in PACKAGES.items()]
    try:
        subprocess.run(["npm", "pack", "--silent", *specifiers], cwd=packages, check=True, stdout=subprocess.DEVNULL)
    except FileNotFoundError as error:
        raise UserError(
            "npm was not found: install Node.js, or pass --packages, a folder with the .tgz files"
        ) from error
    except subprocess.CalledProcessError as error:
        raise UserError(f"npm pack failed with status {error.returncode}; check the network connection") from error


def read_package(packages: Path, name: str, *folders: str) -> dict[str, bytes]:
    """The files of a package in some of its folders, by path. Read in one pass: a .tgz has no random access."""
    archive = packages / f"{name.lstrip('@').replace('/', '-')}-{PACKAGES[name]}.tgz"
    if not archive.exists():
        raise UserError(f"{archive} is missing: run without --packages to download it")
    files: dict[str, bytes] = {}
    with reading(archive, "delete it, or run without --packages"), tarfile.open(archive, "r|gz") as entries:
        for entry in entries:
            path = entry.name.removeprefix("package/")
            if entry.isfile() and path.startswith(folders):
                handle = entries.extractfile(entry)
                assert handle is not None
                files[path] = handle.read()
    return files


def read_tile(files: dict[str, bytes], path: str) -> Image.Image | None:
    """The image at ``path`` as a 64 px RGBA tile, or None if the package lacks it."""
    if path not in files:
        return None
    image = Image.open(io.BytesIO(files[path])).convert("RGBA")
    return image if image.size == (TILE, TILE) else image.resize((TILE, TILE), Image.Resampling.LANCZOS)


def build(out: Path, packages: Path | None = None) -> dict[str, int]:
    """Write ``noto.webp``, ``twemoji.webp``, ``fluent.webp`` and ``objects.json`` into ``out``.

    An emoji is included if all three sets have it and CLDR names it in both languages. Flags, people and skin tones are
    excluded.

    Args:
        packages: folder with the packages as .tgz; None downloads them with npm.

    Returns:
        The numbers of objects, of core objects, and of bytes.

    Raises:
        UserError: npm or a package is missing, or a package lacks a core object.
    """
    check_folder(out)
    with tempfile.TemporaryDirectory() as scratch:
        if packages is None:
            packages = Path(scratch)
            download(packages)
        return _build(out, packages)


def _build(out: Path, packages: Path) -> dict[str, int]:
    google = read_package(packages, "emoji-datasource-google", "emoji.json", "img/google/64/")
    twitter = read_package(packages, "emoji-datasource-twitter", "img/twitter/64/")
    fluent = read_package(packages, "@lobehub/fluent-emoji-3d", "assets/")
    cldr = read_package(packages, "cldr-annotations-full", "annotations/en/", "annotations/zh/")
    english, chinese = (
        json.loads(cldr[f"annotations/{language}/annotations.json"])["annotations"]["annotations"]
        for language in ("en", "zh")
    )

    objects: list[dict[str, object]] = []
    tiles: dict[str, list[Image.Image]] = {"noto": [], "twemoji": [], "fluent": []}
    core = set(core_names())
    used_names: set[str] = set()
    listing = json.loads(google["emoji.json"])
    for entry in sorted(listing, key=lambda item: item["sort_order"]):
        if entry["category"] in EXCLUDED_CATEGORIES:
            continue
        file = entry["image"]
        code = file.removesuffix(".png")
        bare = code.replace("-fe0f", "")
        text = "".join(chr(int(point, 16)) for point in bare.split("-"))
        if text not in english or text not in chinese:
            continue
        name_en, name_zh = english[text]["tts"][0], chinese[text]["tts"][0]
        if name_en in used_names or name_zh in used_names:  # a prompt must identify one object
            continue
        images = {
            "noto": read_tile(google, f"img/google/64/{file}"),
            "twemoji": read_tile(twitter, f"img/twitter/64/{file}"),
            "fluent": read_tile(fluent, f"assets/{code}.webp") or read_tile(fluent, f"assets/{bare}.webp"),
        }
        if any(tile is None for tile in images.values()):
            continue
        used_names |= {name_en, name_zh}
        for style, tile in images.items():
            assert tile is not None
            tiles[style].append(tile)
        group = entry["category"]
        objects.append({"code": bare, "en": name_en, "zh": name_zh, "group": group, "core": name_en in core})

    missing = core - {str(item["en"]) for item in objects}
    if missing:
        raise UserError(f"the packages lack these objects of CORE: {', '.join(sorted(missing))}")

    for style, sheet_tiles in tiles.items():
        rows = -(-len(sheet_tiles) // COLUMNS)
        sheet = Image.new("RGBA", (COLUMNS * TILE, rows * TILE))
        for index, image in enumerate(sheet_tiles):
            sheet.paste(image, (index % COLUMNS * TILE, index // COLUMNS * TILE))
        with atomic_file(out / f"{style}.webp") as aside:
            sheet.save(aside, "WEBP", lossless=True, quality=100, method=6)
    lines = ",\n".join(json.dumps(item, ensure_ascii=False) for item in objects)
    write_text(out / "objects.json", f"[\n{lines}\n]\n")
    return {"objects": len(objects), "core": len(core), "bytes": sum(file.stat().st_size for file in out.iterdir())}
