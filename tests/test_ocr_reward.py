"""The reward of rendered text, on words drawn with Pillow."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fewstep.rewards.edit_distance import edit_distance, similarity
from fewstep.rewards.ocr import in_reading_order, normalized, quoted_texts
from fewstep.rewards.open import open_reward

pytest.importorskip("rapidocr", reason="pip install 'fewstep[ocr]'")

FONT = Path(__file__).parent / "fonts" / "fewstep-test.otf"


def drawn(*lines: str, side: int = 256, pixels: int = 44) -> Tensor:
    """[1, 3, H, W]: dark text on a light background."""
    image = Image.new("RGB", (side, side), (226, 232, 205))
    draw, font = ImageDraw.Draw(image), ImageFont.truetype(str(FONT), pixels)
    for index, line in enumerate(lines):
        width = draw.textlength(line, font=font)
        draw.text(((side - width) / 2, 40 + index * 1.6 * pixels), line, fill=(40, 30, 70), font=font)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255


@pytest.mark.parametrize(
    ("prompt", "right", "wrong"),
    [
        ("a poster with “Coffee” and “Books” on it", ("COFFEE", "BOOKS"), ("Station 19",)),
        ("一家店，招牌上写着“欢迎光临”", ("欢迎光临",), ("火车站",)),
    ],
)
def test_right_text_wrong_text_and_no_text(prompt: str, right: tuple[str, ...], wrong: tuple[str, ...]) -> None:
    reward = open_reward("ocr")
    images = torch.cat([drawn(*right), drawn(*wrong), drawn()])
    scores = reward(images, [prompt] * 3).tolist()
    assert scores[0] > 0.95
    assert scores[1] < 0.3
    assert scores[2] == 0


def test_text_where_none_is_wanted_scores_nothing() -> None:
    images = torch.cat([drawn(), drawn("你好世界")])
    assert open_reward("ocr")(images, ["a cat's paw on Tom's mat"] * 2).tolist() == [1, 0]


def test_a_wrong_letter_costs_its_share() -> None:
    image = drawn("STATION")
    assert open_reward("ocr")(image, ['"STATIXN"']).item() == pytest.approx(6 / 7)


def test_images_of_64_pixels_are_enlarged() -> None:
    assert open_reward("ocr")(drawn("SALE", side=64, pixels=20), ['"SALE"']).item() > 0.95


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ('"one" and "two words"', ["one", "two words"]),
        ("the dog's bowl says 'REX' in Tom's room", ["REX"]),
        ("“甲”和《乙》", ["甲", "乙"]),
        ("‘x y’ „z“", ["x y", "z"]),
        ("it's what's on Jo's mind", []),
        ("", []),
    ],
)
def test_quoted_texts(prompt: str, texts: list[str]) -> None:
    assert quoted_texts(prompt) == texts


def test_edit_distance() -> None:
    assert [edit_distance(*pair) for pair in (("kitten", "sitting"), ("", "abc"), ("same", "same"))] == [3, 3, 0]
    assert edit_distance("ab", "ba") == 2
    assert similarity("", "") == 1
    assert similarity("abcd", "abxd") == 0.75


def test_forms_of_letters_do_not_count() -> None:
    assert normalized("Ｃａｆe\u0301, Nº 5!") == normalized("café no5")


def test_lines_are_read_by_row_then_from_left_to_right() -> None:
    def box(x: float, y: float) -> list[list[float]]:
        return [[x, y], [x + 40, y], [x + 40, y + 20], [x, y + 20]]

    boxes = [box(60, 103), box(0, 100), box(0, 10)]
    lines = [("c", 0.9), ("b", 0.9), ("a", 0.9)]
    assert [text for text, _ in in_reading_order(boxes, lines)] == ["a", "b", "c"]
