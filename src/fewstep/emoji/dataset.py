"""The emoji dataset: real images with bilingual names, small enough for a laptop.

An :class:`EmojiSpec` describes one image and its prompt: an object in a style on a background color, and the prompt's
language. Prompts and images are made from specs; some combinations of the four are held out of training.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fewstep.emoji.build import COLUMNS, TILE
from fewstep.errors import UserError

ASSETS = Path(__file__).parent.parent / "assets" / "emoji"

STYLES = ("noto", "twemoji", "fluent")
#: The styles the teacher is trained on. Fluent 3D is reserved for LoRA training, as a style new to the teacher.
TEACHER_STYLES = ("noto", "twemoji")
LANGUAGES = ("en", "zh")
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "red": (214, 56, 56),
    "yellow": (250, 214, 70),
    "green": (76, 168, 88),
    "blue": (66, 120, 220),
    "purple": (140, 84, 186),
    "pink": (248, 164, 196),
    "white": (250, 250, 250),
    "black": (24, 24, 28),
}
BACKGROUNDS_ZH = {
    "red": "红色",
    "yellow": "黄色",
    "green": "绿色",
    "blue": "蓝色",
    "purple": "紫色",
    "pink": "粉色",
    "white": "白色",
    "black": "黑色",
}
TEMPLATES = {
    "en": (
        "a {style} emoji of {an_object} on a {background} background",
        "{object}, {style} style, {background} background",
        "{an_object} on a {background} background, {style} emoji",
    ),
    "zh": (
        "{background}背景上的{object}，{style} 风格",
        "{style} 风格的{object}，{background}背景",
        "一个{object}的 {style} 表情，背景是{background}",
    ),
}
NUM_TEMPLATES = 3  # of each language
#: Range of an emoji's size relative to the image, and the largest shift from the center relative to the margin: small,
#: because a model of a few million parameters learns every object at every placement.
SCALES = (0.8375, 0.9125)
LARGEST_SHIFT = 0.5
HELD_OUT_IMAGES = 0.15  # fraction of (object, style, background) combinations that are held out in both languages
HELD_OUT_LANGUAGES = 0.10  # fraction of the remaining ones that are held out in one language

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class EmojiObject:
    """A named object.

    Attributes:
        index: position in ``EmojiDataset.objects``.
        tile: position in the image sheets.
        code: Unicode code points in hexadecimal, joined by "-".
        en, zh: CLDR names.
    """

    index: int
    tile: int
    code: str
    en: str
    zh: str


@dataclass(frozen=True)
class EmojiSpec:
    """One image and the language of its prompt.

    Attributes:
        object: index into ``EmojiDataset.objects``.
        style: one of STYLES.
        background: one of BACKGROUNDS.
        language: one of LANGUAGES.
    """

    object: int
    style: str
    background: str
    language: str


def _fraction(*key: str) -> float:
    """A number in [0, 1) that depends on the key alone, on every machine."""
    digest = hashlib.sha256("|".join(key).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


@cache
def _split_of(code: str, style: str, background: str, language: str) -> Split:
    held_out: Split = "validation" if _fraction("half", code, style, background) < 0.5 else "test"
    if _fraction("triple", code, style, background) < HELD_OUT_IMAGES:
        return held_out
    if _fraction("language", code, style, background) < HELD_OUT_LANGUAGES:
        unseen = LANGUAGES[_fraction("which", code, style, background) < 0.5]
        return held_out if language == unseen else "train"
    return "train"


def with_article(name: str) -> str:
    """``name`` with "a" or "an"; plural names stay without an article."""
    if name.endswith("s") and not name.endswith(("us", "ss")):
        return name
    return f"an {name}" if name[0].lower() in "aeio" else f"a {name}"


class EmojiDataset:
    """Images, names, prompts and splits.

    Args:
        objects: the objects of the dataset in order; specs and labels refer to them by index.
    """

    def __init__(self, objects: Sequence[EmojiObject]) -> None:
        self.objects = list(objects)
        self._by_name = {"en": {o.en: o.index for o in objects}, "zh": {o.zh: o.index for o in objects}}

    @classmethod
    def load(cls, count: int | None = None) -> EmojiDataset:
        """The core objects (``build.CORE``), or the first ``count`` of them. Raises: UserError if there are fewer."""
        core = [item for item, is_core in _listing() if is_core]
        if count is not None and count > len(core):
            raise UserError(f"num_objects {count}: the dataset has {len(core)} objects")
        core = core[:count]
        return cls([EmojiObject(index, o.tile, o.code, o.en, o.zh) for index, o in enumerate(core)])

    @classmethod
    def load_all(cls) -> EmojiDataset:
        """All bundled objects, core or not."""
        return cls([item for item, _ in _listing()])

    # -- specs and prompts ----------------------------------------------------------------------------------------

    def split_of(self, spec: EmojiSpec) -> Split:
        """The split of a spec, by a hash of its object's code, style, background and language.

        All held-out specs of one (object, style, background) are in the same split, whatever their language: no image
        is both a validation and a test image.
        """
        return _split_of(self.objects[spec.object].code, spec.style, spec.background, spec.language)

    def specs(self, split: Split | None = None, styles: Sequence[str] = TEACHER_STYLES) -> list[EmojiSpec]:
        """All specs of a split, or of the whole dataset, in a fixed order."""
        every = (
            EmojiSpec(item.index, style, background, language)
            for item in self.objects
            for style in styles
            for background in BACKGROUNDS
            for language in LANGUAGES
        )
        return [spec for spec in every if split is None or split == self.split_of(spec)]

    def sample(
        self, count: int, split: Split | None = None, seed: int = 0, styles: Sequence[str] = TEACHER_STYLES
    ) -> list[EmojiSpec]:
        """``count`` specs of a split in an order shuffled by ``seed``; repeats them if there are fewer."""
        pool = self.specs(split, styles)
        order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed)).tolist()
        return [pool[order[i % len(pool)]] for i in range(count)]

    def prompt(self, spec: EmojiSpec, template: int = 0) -> str:
        """The prompt of a spec, worded by TEMPLATES[spec.language][template]."""
        item = self.objects[spec.object]
        pattern = TEMPLATES[spec.language][template]
        if spec.language == "zh":
            return pattern.format(style=spec.style, object=item.zh, background=BACKGROUNDS_ZH[spec.background])
        return pattern.format(
            style=spec.style, object=item.en, an_object=with_article(item.en), background=spec.background
        )

    @cached_property
    def _patterns(self) -> list[tuple[str, re.Pattern[str]]]:
        fields = {"style": "(?P<style>[a-z]+)", "background": "(?P<background>\\S+?)"}
        patterns = []
        for language, templates in TEMPLATES.items():
            for template in templates:
                text = re.escape(template).replace("\\{", "{").replace("\\}", "}")
                name = "(?P<object>.+?)"
                text = text.replace("{an_object}", f"(?:an? )?{name}").replace("{object}", name)
                for field, pattern in fields.items():
                    text = text.replace(f"{{{field}}}", pattern)
                patterns.append((language, re.compile(text)))
        return patterns

    def parse(self, prompt: str) -> EmojiSpec | None:
        """The spec that a prompt describes, or None if it matches no template: the inverse of :meth:`prompt`."""
        for language, pattern in self._patterns:
            match = pattern.fullmatch(prompt.strip())
            if match is None:
                continue
            index = self._by_name[language].get(match["object"])
            backgrounds = (
                {name: name for name in BACKGROUNDS} if language == "en" else {z: c for c, z in BACKGROUNDS_ZH.items()}
            )
            if index is not None and match["style"] in STYLES and match["background"] in backgrounds:
                return EmojiSpec(index, match["style"], backgrounds[match["background"]], language)
        return None

    def language(self, prompt: str) -> str | None:
        """ "en" or "zh", or None where the prompt is not of the dataset."""
        spec = self.parse(prompt)
        return None if spec is None else spec.language

    # -- images ---------------------------------------------------------------------------------------------------

    def render(
        self,
        specs: Sequence[EmojiSpec],
        generator: torch.Generator | None = None,
        size: int = 64,
        jitter: bool = True,
    ) -> Tensor:
        """Real images of specs: the emoji over its background, alpha composited.

        With ``jitter`` each image has a random scale and position (``SCALES``, ``LARGEST_SHIFT``), and a slightly
        different shade of the background, so that a prompt has many correct images. Without it the emoji is centered at
        scale 0.875.

        Returns:
            [B, 3, size, size] in [0, 1].
        """
        count = len(specs)
        emoji = torch.stack([_tiles(s.style)[self.objects[s.object].tile] for s in specs]).float() / 255
        colors = torch.tensor([BACKGROUNDS[s.background] for s in specs]).float() / 255
        if jitter:
            noise = torch.rand(count, 6, generator=generator)
            scale = SCALES[0] + (SCALES[1] - SCALES[0]) * noise[:, 0]
            offset = LARGEST_SHIFT * (2 * noise[:, 1:3] - 1) * (1 - scale)[:, None]
            colors = (colors + 0.10 * (noise[:, 3:6] - 0.5)).clamp(0, 1)
        else:
            scale, offset = torch.full((count,), 0.875), torch.zeros(count, 2)
        # premultiplied alpha: without it the hidden colors of transparent pixels bleed into the resized edges
        emoji = torch.cat([emoji[:, :3] * emoji[:, 3:], emoji[:, 3:]], dim=1)
        affine = torch.zeros(count, 2, 3)
        affine[:, 0, 0] = affine[:, 1, 1] = 1 / scale
        affine[:, :, 2] = -offset / scale[:, None]
        grid = F.affine_grid(affine, [count, 4, size, size], align_corners=False)
        placed = F.grid_sample(emoji, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        return (placed[:, :3] + (1 - placed[:, 3:]) * colors[:, :, None, None]).clamp(0, 1)


@cache
def _listing() -> list[tuple[EmojiObject, bool]]:
    """Every bundled object, and whether it is core."""
    entries = json.loads((ASSETS / "objects.json").read_text(encoding="utf-8"))
    return [(EmojiObject(i, i, e["code"], e["en"], e["zh"]), e["core"]) for i, e in enumerate(entries)]


@cache
def _tiles(style: str) -> Tensor:
    """uint8 [N, 4, 64, 64]: all emoji of one set, RGBA."""
    with Image.open(ASSETS / f"{style}.webp") as sheet:
        pixels = torch.from_numpy(np.array(sheet.convert("RGBA")))
    rows = pixels.shape[0] // TILE
    tiles = pixels.reshape(rows, TILE, COLUMNS, TILE, 4).permute(0, 2, 4, 1, 3).reshape(-1, 4, TILE, TILE)
    return tiles[: len(_listing())].contiguous()
