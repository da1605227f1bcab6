"""How alike two texts are."""

from __future__ import annotations


def edit_distance(one: str, other: str) -> int:
    """The least number of characters that are inserted, deleted or replaced to turn one text into the other
    (Levenshtein 1966)."""
    row = list(range(len(other) + 1))
    for index, left in enumerate(one, 1):
        above, row[0] = row[0], index
        for column, right in enumerate(other, 1):
            above, row[column] = row[column], min(row[column] + 1, row[column - 1] + 1, above + (left != right))
    return row[-1]


def similarity(one: str, other: str) -> float:
    """1 - edit distance / length of the longer text, in [0, 1]; 1 of two empty texts."""
    longest = max(len(one), len(other))
    return 1 - edit_distance(one, other) / longest if longest else 1.0
