"""The emoji world: real images with real bilingual names, small enough for a laptop.

A *concept* is a thing, drawn in a style, on a background color, named in a language. Prompts and images are made from
concepts; unseen combinations of the four are held out.
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

ASSETS = Path(__file__).parent.parent / "assets" / "emoji"

STYLES = ("noto", "twemoji", "fluent")
#: The styles the teacher is trained on. Fluent 3D is kept from it: LoRA training is tried on a style never seen.
TEACHER_STYLES = ("noto", "twemoji")
LANGUAGES = ("en", "zh")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 56, 56),
    "yellow": (250, 214, 70),
    "green": (76, 168, 88),
    "blue": (66, 120, 220),
    "purple": (140, 84, 186),
    "pink": (248, 164, 196),
    "white": (250, 250, 250),
    "black": (24, 24, 28),
}
COLORS_ZH = {
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
        "a {style} emoji of {a_thing} on a {color} background",
        "{thing}, {style} style, {color} background",
        "{a_thing} on a {color} background, {style} emoji",
    ),
    "zh": (
        "{color}背景上的{thing}，{style} 风格",
        "{style} 风格的{thing}，{color}背景",
        "一个{thing}的 {style} 表情，背景是{color}",
    ),
}
HELD_OUT_TRIPLES = 0.15  # a thing in a style on a color: in neither language
HELD_OUT_LANGUAGES = 0.10  # of the rest: seen in one language only

Split = Literal["train", "heldout", "all"]


@dataclass(frozen=True)
class EmojiObject:
    """One named thing; ``tile`` is its place in the sheets, ``index`` its place in ``EmojiWorld.things``."""

    index: int
    tile: int
    code: str
    en: str
    zh: str


@dataclass(frozen=True)
class EmojiSpec:
    thing: int
    style: str
    color: str
    language: str


def _fraction(*key: object) -> float:
    """A number in [0, 1) that depends on the key alone, on every machine."""
    digest = hashlib.sha256("|".join(map(str, key)).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def with_article(name: str) -> str:
    """``name`` with "a" or "an"; plurals go without."""
    if name.endswith("s") and not name.endswith(("us", "ss")):
        return name
    return f"an {name}" if name[0].lower() in "aeio" else f"a {name}"


class EmojiDataset:
    """Images, names, prompts and splits.

    Args:
        things: the things that take part, in order; prompts, labels and splits speak of their indices.
    """

    def __init__(self, things: Sequence[EmojiObject]) -> None:
        self.things = list(things)
        self._by_name = {"en": {t.en: t.index for t in things}, "zh": {t.zh: t.index for t in things}}

    @classmethod
    def load(cls, count: int | None = None) -> EmojiDataset:
        """The core things (see ``emoji_build.CORE``), or the first ``count`` of them."""
        core = [thing for thing, is_core in _listing() if is_core][:count]
        return cls([EmojiObject(index, t.tile, t.code, t.en, t.zh) for index, t in enumerate(core)])

    @classmethod
    def everything(cls) -> EmojiDataset:
        """Every thing that is shipped, core or not."""
        return cls([EmojiObject(index, t.tile, t.code, t.en, t.zh) for index, (t, _) in enumerate(_listing())])

    # -- concepts and prompts -------------------------------------------------------------------------------------

    def split_of(self, concept: EmojiSpec) -> Literal["train", "heldout"]:
        code = self.things[concept.thing].code
        triple = (code, concept.style, concept.color)
        if _fraction("triple", *triple) < HELD_OUT_TRIPLES:
            return "heldout"
        if _fraction("language", *triple) < HELD_OUT_LANGUAGES:
            unseen = LANGUAGES[_fraction("which", *triple) < 0.5]
            return "heldout" if concept.language == unseen else "train"
        return "train"

    def concepts(self, split: Split = "all", styles: Sequence[str] = TEACHER_STYLES) -> list[EmojiSpec]:
        """All concepts of a split, in a fixed order."""
        every = (
            EmojiSpec(thing.index, style, color, language)
            for thing in self.things
            for style in styles
            for color in COLORS
            for language in LANGUAGES
        )
        return [concept for concept in every if split in ("all", self.split_of(concept))]

    def sample(
        self, count: int, split: Split, seed: int = 0, styles: Sequence[str] = TEACHER_STYLES
    ) -> list[EmojiSpec]:
        """``count`` concepts of a split in a shuffled order that ``seed`` fixes; cycles when there are too few."""
        pool = self.concepts(split, styles)
        order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed)).tolist()
        return [pool[order[i % len(pool)]] for i in range(count)]

    def prompt(self, concept: EmojiSpec, template: int = 0) -> str:
        thing = self.things[concept.thing]
        pattern = TEMPLATES[concept.language][template]
        if concept.language == "zh":
            return pattern.format(style=concept.style, thing=thing.zh, color=COLORS_ZH[concept.color])
        return pattern.format(style=concept.style, thing=thing.en, a_thing=with_article(thing.en), color=concept.color)

    @cached_property
    def _patterns(self) -> list[tuple[str, re.Pattern[str]]]:
        fields = {"style": "(?P<style>[a-z]+)", "color": "(?P<color>\\S+?)"}
        patterns = []
        for language, templates in TEMPLATES.items():
            for template in templates:
                text = re.escape(template).replace("\\{", "{").replace("\\}", "}")
                thing = "(?P<thing>.+?)"
                text = text.replace("{a_thing}", f"(?:an? )?{thing}").replace("{thing}", thing)
                for field, pattern in fields.items():
                    text = text.replace(f"{{{field}}}", pattern)
                patterns.append((language, re.compile(text)))
        return patterns

    def parse(self, prompt: str) -> EmojiSpec | None:
        """The concept a prompt speaks of, or None where it follows no template: the inverse of :meth:`prompt`."""
        for language, pattern in self._patterns:
            match = pattern.fullmatch(prompt.strip())
            if match is None:
                continue
            thing = self._by_name[language].get(match["thing"])
            colors = {name: name for name in COLORS} if language == "en" else {z: c for c, z in COLORS_ZH.items()}
            if thing is not None and match["style"] in STYLES and match["color"] in colors:
                return EmojiSpec(thing, match["style"], colors[match["color"]], language)
        return None

    # -- images ---------------------------------------------------------------------------------------------------

    def render(
        self,
        concepts: Sequence[EmojiSpec],
        generator: torch.Generator | None = None,
        size: int = 64,
        jitter: bool = True,
    ) -> Tensor:
        """Real images of concepts: the drawing on its background, alpha composed.

        With ``jitter`` each image gets a scale in [0.80, 0.95], a place that keeps it whole and a slightly different
        shade, so that one prompt has many right images; without, a centred one of scale 0.875.

        Returns:
            [B, 3, size, size] in [0, 1].
        """
        count = len(concepts)
        drawings = torch.stack([_tiles(c.style)[self.things[c.thing].tile] for c in concepts]).float() / 255
        colors = torch.tensor([COLORS[c.color] for c in concepts]).float() / 255
        if jitter:
            noise = torch.rand(count, 6, generator=generator)
            scale = 0.80 + 0.15 * noise[:, 0]
            offset = (2 * noise[:, 1:3] - 1) * (1 - scale)[:, None]
            colors = (colors + 0.10 * (noise[:, 3:6] - 0.5)).clamp(0, 1)
        else:
            scale, offset = torch.full((count,), 0.875), torch.zeros(count, 2)
        # premultiplied alpha, or transparent pixels' hidden colors bleed in when the drawing is resized
        drawings = torch.cat([drawings[:, :3] * drawings[:, 3:], drawings[:, 3:]], dim=1)
        affine = torch.zeros(count, 2, 3)
        affine[:, 0, 0] = affine[:, 1, 1] = 1 / scale
        affine[:, :, 2] = -offset / scale[:, None]
        grid = F.affine_grid(affine, [count, 4, size, size], align_corners=False)
        placed = F.grid_sample(drawings, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        return (placed[:, :3] + (1 - placed[:, 3:]) * colors[:, :, None, None]).clamp(0, 1)


@cache
def _listing() -> list[tuple[EmojiObject, bool]]:
    entries = json.loads((ASSETS / "things.json").read_text(encoding="utf-8"))
    return [(EmojiObject(i, i, e["code"], e["en"], e["zh"]), e["core"]) for i, e in enumerate(entries)]


@cache
def _tiles(style: str) -> Tensor:
    """uint8 [N, 4, 64, 64]: every drawing of one set."""
    with Image.open(ASSETS / f"{style}.webp") as sheet:
        pixels = torch.from_numpy(np.array(sheet.convert("RGBA")))
    rows = pixels.shape[0] // TILE
    tiles = pixels.reshape(rows, TILE, COLUMNS, TILE, 4).permute(0, 2, 4, 1, 3).reshape(-1, 4, TILE, TILE)
    return tiles[: len(_listing())].contiguous()
