"""Training, validation and test prompts from files, and sources that plug-ins register."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from fewstep.config.sections import PromptSettings
from fewstep.core.registry import prompt_sources
from fewstep.data.prompt_shards import PromptShards, write_prompt_index, write_prompt_shard
from fewstep.data.prompts import open_prompts
from fewstep.errors import UserError

SPLITS = ("train", "validation", "test")


def write_prompts(folder: Path, texts: Sequence[str], name: str = "prompts.txt") -> Path:
    file = folder / name
    file.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return file


def write_shards(folder: Path, texts: Sequence[str], size: int = 40) -> Path:
    """Encoded prompts; the features of prompt i are i % 3 + 1 tokens of the value i."""
    folder.mkdir()
    parts = [texts[start : start + size] for start in range(0, len(texts), size)]
    for number, part in enumerate(parts):
        rows = [number * size + row for row in range(len(part))]
        write_prompt_shard(folder, number, part, [torch.full((row % 3 + 1, 2), float(row)) for row in rows])
    write_prompt_index(folder, {"encoder": "x"}, [len(part) for part in parts], {})
    return folder


def split(source: Path | str, **options: object) -> dict[str, list[str]]:
    opened = open_prompts(PromptSettings(source=str(source), **options))
    return {name: list(opened.texts(name)) for name in SPLITS}


def flat(parts: dict[str, list[str]]) -> list[str]:
    return [text for part in parts.values() for text in part]


def numbered(count: int) -> list[str]:
    return [f"prompt {number}" for number in range(count)]


def test_fractions_are_held_out_of_a_long_list(tmp_path: Path) -> None:
    texts = numbered(2000)
    parts = split(write_prompts(tmp_path, texts))
    assert sorted(flat(parts)) == sorted(texts)  # complete and disjoint
    assert [text for text in texts if text in set(parts["train"])] == parts["train"]  # in the order of the file
    for name in ("validation", "test"):
        assert 60 < len(parts[name]) < 140  # 100 expected
    larger = split(write_prompts(tmp_path, texts), heldout_fraction=0.2)
    assert 330 < len(larger["test"]) < 470


def test_a_prompt_keeps_its_split_when_the_list_grows_or_is_shuffled(tmp_path: Path) -> None:
    before = split(write_prompts(tmp_path, numbered(1000)))
    after = split(write_prompts(tmp_path, numbered(1500)[::-1]))
    assert all(set(before[name]) <= set(after[name]) for name in SPLITS)


def test_repeated_prompts_are_in_one_split(tmp_path: Path) -> None:
    parts = split(write_prompts(tmp_path, numbered(100) * 3))
    assert sum(len(set(part)) for part in parts.values()) == 100
    assert len(flat(parts)) == 300


@pytest.mark.parametrize("count", [3, 4, 10])
@pytest.mark.parametrize("fraction", [0.01, 0.05, 0.49])
def test_every_split_of_a_short_list_has_a_prompt(tmp_path: Path, count: int, fraction: float) -> None:
    parts = split(write_prompts(tmp_path, numbered(count)), heldout_fraction=fraction)
    assert all(parts.values())
    assert sorted(flat(parts)) == sorted(numbered(count))


def test_nothing_is_held_out_of_two_prompts_or_with_fraction_0(tmp_path: Path) -> None:
    assert split(write_prompts(tmp_path, numbered(2))) == {"train": numbered(2), "validation": [], "test": []}
    parts = split(write_prompts(tmp_path, numbered(50)), heldout_fraction=0)
    assert parts == {"train": numbered(50), "validation": [], "test": []}


@pytest.mark.filterwarnings("ignore:.*prompts are also")
def test_files_name_the_held_out_prompts(tmp_path: Path) -> None:
    source = write_prompts(tmp_path, [*numbered(100), "both", "tested"])
    validation = write_prompts(tmp_path, ["validated", "both", "tested"], "validation.txt")
    test = write_prompts(tmp_path, ["tested", "another"], "test.txt")
    parts = split(source, validation_source=str(validation), test_source=str(test))
    assert parts == {"train": numbered(100), "validation": ["validated", "both"], "test": ["tested", "another"]}
    only_test = split(source, test_source=str(test))
    assert only_test["test"] == ["tested", "another"]
    assert 0 < len(only_test["validation"]) < 20
    assert len(only_test["train"]) + len(only_test["validation"]) == 101
    with pytest.raises(UserError, match=r"prompts\.txt: every prompt is a validation or test prompt"):
        split(source, test_source=str(source))


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.txt: No such file"):
        split(tmp_path / "nowhere.txt")
    source = write_prompts(tmp_path, numbered(5))
    with pytest.raises(UserError, match=r"nowhere\.txt: No such file"):
        split(source, validation_source=str(tmp_path / "nowhere.txt"))


def test_encoded_prompts_have_the_splits_of_their_text_file_and_stay_on_disk(tmp_path: Path) -> None:
    texts = numbered(300)
    folder = write_shards(tmp_path / "shards", texts)
    assert split(folder) == split(write_prompts(tmp_path, texts))
    source = open_prompts(PromptSettings(source=str(folder)))
    for name in SPLITS:
        prompts = source.texts(name)
        assert isinstance(prompts, PromptShards)
        prompts.check({"encoder": "x"})
        rows = [0, len(prompts) - 1, 3]
        numbers = [texts.index(prompts[row]) for row in rows]
        encoded = prompts.encoded(rows)
        assert encoded.features[:, 0, 0].tolist() == numbers
        assert encoded.lengths.tolist() == [number % 3 + 1 for number in numbers]
        assert prompts[-1] == prompts[len(prompts) - 1]
        assert prompts[:2] == [prompts[0], prompts[1]]
        with pytest.raises(IndexError):
            prompts[len(prompts)]


def test_selections_of_encoded_prompts_compose(tmp_path: Path) -> None:
    shards = PromptShards(write_shards(tmp_path / "shards", numbered(100)))
    assert list(shards.select([90, 3, 50]).select([2, 0])) == ["prompt 50", "prompt 90"]
    assert len(shards) == 100


def test_registered_sources_are_found_by_name() -> None:
    @prompt_sources.register("haiku")
    class Haiku:
        def __init__(self, settings: PromptSettings) -> None:
            self.fraction = settings.heldout_fraction

        def texts(self, split: str) -> list[str]:
            return [f"{split} {self.fraction}"]

    assert split("haiku", heldout_fraction=0.25)["test"] == ["test 0.25"]
