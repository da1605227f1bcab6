"""The report in one picture, for a README: rows are settings, columns are prompts."""

from __future__ import annotations

import re

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fewstep.evaluation.metrics_file import Samples

_TILE, _GAP, _LABEL, _MARGIN = 96, 6, 132, 16
_INK, _DIM, _PAPER = (24, 26, 30), (104, 110, 120), (255, 255, 255)
#: Families with Chinese characters that the usual systems have.
_CHINESE: tuple[str, ...] = (
    "Noto Sans CJK SC",
    "Noto Sans SC",
    "Source Han Sans SC",
    "WenQuanYi Zen Hei",
    "PingFang SC",
    "PingFang HK",
)
_CHINESE += ("Heiti SC", "STHeiti", "Microsoft YaHei", "SimHei", "Arial Unicode MS")

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def picture(samples: Samples, count: int = 9) -> Image.Image:
    """`count` prompts side by side; those this system has no letters for are passed over."""
    small, bold = _fonts(12), ImageFont.load_default(15)
    chosen = [i for i, prompt in enumerate(samples.prompts) if small["zh"] is not None or prompt.isascii()][:count]
    chosen = chosen or list(range(min(count, len(samples.prompts))))
    latin, chinese = small["en"], small["zh"] or small["en"]
    assert latin is not None
    assert chinese is not None
    prompts = [samples.prompts[i] for i in chosen]
    columns = samples.columns.values()
    height, width = next(iter(columns)).images.shape[1:3]
    wide = round(_TILE * width / height)
    texts = [_wrapped(prompt, latin if prompt.isascii() else chinese, wide) for prompt in prompts]
    head = max(len(lines) for lines in texts) * 15 + 8

    canvas = Image.new(
        "RGB",
        (2 * _MARGIN + _LABEL + len(chosen) * (wide + _GAP), 2 * _MARGIN + head + len(columns) * (_TILE + _GAP)),
        _PAPER,
    )
    draw = ImageDraw.Draw(canvas)
    for place, (prompt, lines) in enumerate(zip(prompts, texts, strict=True)):
        font = latin if prompt.isascii() else chinese
        for line, text in enumerate(lines):
            draw.text((_left(place, wide), _MARGIN + 15 * line), text, fill=_DIM, font=font)
    for row, column in enumerate(columns):
        top = _MARGIN + head + row * (_TILE + _GAP)
        who, _, how = column.title.partition(", ")
        draw.text((_MARGIN, top + 26), who, fill=_INK, font=bold)
        for line, text in enumerate(how.split(", ")):
            draw.text((_MARGIN, top + 46 + 15 * line), text, fill=_DIM, font=latin)
        for place, index in enumerate(chosen):
            small_image = tile(column.images[index]).resize((wide, _TILE), Image.Resampling.LANCZOS)
            canvas.paste(small_image, (_left(place, wide), top))
    return canvas


def tile(image: Tensor) -> Image.Image:
    """uint8 [H,W,3] -> a PIL image."""
    return Image.fromarray(image.contiguous().numpy())


def _left(place: int, wide: int) -> int:
    return _MARGIN + _LABEL + place * (wide + _GAP)


def _fonts(size: int) -> dict[str, Font | None]:
    """A font for Latin letters, Pillow's own, and one for Chinese if the system has it."""
    from matplotlib.font_manager import fontManager

    found = {entry.name: entry.fname for entry in fontManager.ttflist}
    path = next((found[family] for family in _CHINESE if family in found), None)
    return {"en": ImageFont.load_default(size), "zh": ImageFont.truetype(path, size) if path else None}


def _wrapped(text: str, font: Font, width: int) -> list[str]:
    """Lines no wider than `width` pixels, broken after words and Chinese characters, but not before punctuation."""
    lines = [""]
    for unit in re.findall(r"(?:[!-~]+|\S)[，。、]*\s*", text):
        if font.getlength((lines[-1] + unit).rstrip()) <= width or not lines[-1]:
            lines[-1] += unit
        else:
            lines.append(unit)
    return [line.rstrip() for line in lines]
