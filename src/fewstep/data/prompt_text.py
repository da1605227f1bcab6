"""One prompt's text: what every reader of prompts does to it, and when two prompts count as the same."""

from __future__ import annotations

import unicodedata

_SPACES = dict.fromkeys([*range(0x20), *range(0x7F, 0xA0)], " ")  # control characters, tabs and line ends among them
_REMOVED = dict.fromkeys([0xFEFF, 0x200B, 0x2060, *range(0xD800, 0xE000)])  # no glyph, or half of a character
_TABLE: dict[int, str | None] = {**_SPACES, **_REMOVED}

#: Characters of other categories that show nothing: fillers, the blank Braille pattern, variation selectors.
_BLANK = {0x034F, 0x115F, 0x1160, 0x2800, 0x3164, 0xFFA0, *range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)}


def clean_prompt(text: str) -> str:
    """The prompt in composed Unicode (NFC), on one line, with single spaces; "" if no character of it is visible.

    White space of any kind, line and paragraph separators and control characters become one space. Byte-order marks,
    zero-width spaces, word joiners and lone surrogates are removed. Joiners within emoji and scripts are kept.
    """
    cleaned = " ".join(unicodedata.normalize("NFC", text.translate(_TABLE)).split())
    return cleaned if any(map(_visible, cleaned)) else ""


def comparison_key(text: str) -> str:
    """Equal for prompts that differ only in case, white space, compatibility forms or invisible characters."""
    return " ".join(unicodedata.normalize("NFKC", clean_prompt(text)).casefold().split())


def _visible(character: str) -> bool:
    return unicodedata.category(character) not in ("Cc", "Cf", "Zs", "Zl", "Zp") and ord(character) not in _BLANK
