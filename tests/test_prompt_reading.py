"""One reader of prompts: what each format means, what happens to text that is not clean, the same in every command."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from fewstep import api
from fewstep.cli.main import app
from fewstep.config.sections import PromptSettings
from fewstep.data.prepare_prompts import prepare_prompts
from fewstep.data.prompt_files import read_prompts
from fewstep.data.prompt_shards import PromptShards
from fewstep.data.prompt_text import clean_prompt, comparison_key
from fewstep.data.prompts import check_held_out, open_prompts
from fewstep.errors import UserError
from fewstep.evaluation.prompts import read_test_prompts
from fewstep.models.pipeline import TextToImagePipeline

FOX, APPLE = "a noto emoji of a fox on a blue background", "a red apple"


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    return path


#: File name, content, prompts.
SOURCES = {
    "line separators": ("a.txt", f"{FOX} \u2028in the morning\n{APPLE}\x0bwith a leaf\x85there\n",
                        [f"{FOX} in the morning", f"{APPLE} with a leaf there"]),
    "line ends": ("a.txt", "one\r\ntwo\rthree\n", ["one", "two", "three"]),
    "comments": ("a.txt", "# a comment\n  #another\na fox # not one\n\\#sunset at sea\n",
                 ["a fox # not one", "#sunset at sea"]),
    "byte-order marks": ("a.txt", "\ufeff# c\n\ufeffa fox\ufeff\na \ufeffdog\n", ["a fox", "a dog"]),
    "invisible lines": ("a.txt", "\u200b\n\ufeff\u200d\n\ufe0f\u2800\na fox\n", ["a fox"]),
    "control characters": ("a.txt", "a\x07fox\x1b \t runs\n", ["a fox runs"]),
    "json lines": ("captions.jsonl", f'{{"image": "0.png", "prompt": "{FOX}"}}\n', [FOX]),
    "json lines by content": ("captions.txt", f'{{"image": "0.png", "prompt": "{FOX}"}}\n', [FOX]),
    "json lines without extension": ("captions", f'\ufeff\n{{"prompt": "{FOX}"}}\n', [FOX]),
    "text of another extension": ("list.prompts", "{red|blue} fox\n", ["{red|blue} fox"]),
    "byte-order mark in json": ("a.jsonl", f'\ufeff{{"prompt": "{FOX}"}}\n\ufeff"{APPLE}"\n', [FOX, APPLE]),
    "lone surrogate": ("a.jsonl", '{"prompt": "a smiling cat \\ud83d"}\n{"prompt": "\\udc00"}\n', ["a smiling cat"]),
    "surrogate pair": ("a.jsonl", '{"prompt": "a smiling \\ud83d\\ude00"}\n', ["a smiling 😀"]),
    "list field": ("a.jsonl", f'{{"prompt": ["{FOX}", null, "{APPLE}"]}}\n', [FOX, APPLE]),
    "control characters in json": ("a.jsonl", '{"prompt": "a\\u0000fox\\nruns"}\n', ["a fox runs"]),
    "json array": ("a.json", f'[\n "{FOX}",\n {{"prompt": "{APPLE}"}}\n]', [FOX, APPLE]),
    "json object": ("a.json", f'{{"prompt": ["{FOX}", "{APPLE}"]}}', [FOX, APPLE]),
    "several objects in json": ("a.json", f'{{"prompt": "{FOX}"}}\n{{"prompt": "{APPLE}"}}\n', [FOX, APPLE]),
    "csv": ("a.csv", f'id,prompt\n1,"a ""big"" fox, asleep"\n\n2,{APPLE}\n', ['a "big" fox, asleep', APPLE]),
    "semicolons": ("a.csv", "\ufeffid; prompt\n1;a fox, asleep\n", ["a fox, asleep"]),
    "tabs": ("a.tsv", "id\tprompt\n1\ta 5\" fox, asleep\n", ['a 5" fox, asleep']),
    "emoji sequences": ("a.txt", "👨\u200d👩\u200d👧 and ❤\ufe0f\n", ["👨\u200d👩\u200d👧 and ❤\ufe0f"]),
    "composed": ("a.txt", "cafe\u0301\n", ["café"]),
}  # fmt: skip


@pytest.mark.parametrize("case", SOURCES)
def test_what_a_source_means_is_the_same_everywhere(tmp_path: Path, case: str, tiny: TextToImagePipeline) -> None:
    name, content, expected = SOURCES[case]
    path = write(tmp_path, name, content)
    assert read_prompts(path) == expected
    assert read_test_prompts(path, 100) == expected
    opened = open_prompts(PromptSettings(source=str(path), heldout_fraction=0))
    assert list(opened.texts("train")) == expected
    prepare_prompts([str(path)], tiny.encoder, tmp_path / "encoded")
    assert list(PromptShards(tmp_path / "encoded")) == expected
    assert read_prompts(tmp_path / "encoded") == expected


#: File name, content, message.
MISTAKES = {
    "list of numbers": ("a.jsonl", '{"prompt": "a"}\n{"prompt": [1]}', "a.jsonl, line 2: prompt holds a number"),
    "object field": ("a.jsonl", '{"prompt": {"en": "a"}}', "a.jsonl, line 1: prompt holds an object"),
    "number": ("a.json", '["a", 3]', "a.json, entry 2: the row holds a number"),
    "broken json": ("a.json", '["a",', "a.json: not JSON"),
    "deep json": ("a.jsonl", "[" * 100_000, "a.jsonl, line 1: not JSON"),
    "unclosed quote": ("a.csv", 'prompt,n\na fox,1\n"a dog,2\na cat,3\n', "a.csv, line 3: unexpected end of data"),
    "quote closed too late": ("a.csv", 'prompt,n\n"a fox,1\n"a dog",2\n', "a.csv, line 2: .*close each quote"),
    "comma without quotes": ("a.csv", "id,prompt\n1,a fox, asleep\n", "a.csv, line 2: 3 fields, but the header has 2"),
    "two columns": ("a.csv", "prompt,prompt\na,b\n", "a.csv: two columns 'prompt'"),
    "no header": ("a.csv", "", "a.csv: no 'prompt'; there are none"),
    "utf-16": ("a.txt", "a fox\n".encode("utf-16"), "a.txt: UTF-16, not a UTF-8 text file; save it as UTF-8"),
    "utf-16 without mark": ("a.txt", "a fox\n".encode("utf-16-le"), "a.txt, line 1: a NUL character"),
    "latin-1": ("a.txt", "a fox\ncaf\xe9\n".encode("latin-1"), "a.txt, line 2: not a UTF-8 text file"),
    "latin-1 csv": ("a.csv", "prompt\ncaf\xe9\n".encode("latin-1"), "a.csv, line 2: not a UTF-8 text file"),
    "spreadsheet": ("a.xlsx", b"PK\x03\x04\x14\0\x08\0", "a.xlsx: not a text file; prompts come from"),
    "comments only": ("a.txt", "# one\n#two\n\n", "a.txt: no prompts in it"),
    "invisible only": ("a.txt", "\u200b\n\ufeff\n", "a.txt: no prompts in it"),
    "damaged parquet": ("a", b"PAR1" + bytes(100), "a: cannot be read \\(.*\\); not a parquet file, or a damaged one"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_one_line_in_every_command(tmp_path: Path, case: str) -> None:
    name, content, message = MISTAKES[case]
    path = write(tmp_path, name, content)
    for read in (read_prompts, lambda p: read_test_prompts(p, 10)):
        with pytest.raises(UserError, match=message) as error:
            read(path)
        assert "\n" not in str(error.value)
    for option in ("validation_source", "test_source"):
        other = write(tmp_path, "good.txt", "a\nb\nc\n")
        with pytest.raises(UserError, match=message):
            open_prompts(PromptSettings(source=str(other), **{option: str(path)}))
    for command in (["generate", "nowhere", "--prompts-file"], ["evaluate", "nowhere", "--prompts"]):
        done = CliRunner().invoke(app, [*command, str(path)])
        assert done.exit_code == 1
        assert re.search(message, done.stderr)
        assert done.stderr.count("\n") == 1


def test_a_prompt_in_place_of_a_file_is_one_line() -> None:
    """Such a name is too long for a file system."""
    prompt = "a fox in the snow, " * 300
    for read in (read_prompts, lambda p: read_test_prompts(p, 10), lambda p: open_prompts(PromptSettings(source=p))):
        with pytest.raises(UserError, match=r"a fox in the snow.*File name too long"):
            read(prompt)


def test_columns_are_named_in_commands_and_recipes(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", f'{{"text": "{FOX}"}}\n')
    assert read_prompts(path, "text") == [FOX]
    assert list(open_prompts(PromptSettings(source=str(path), column="text")).texts("train")) == [FOX]
    for command in (["generate", "nowhere", "--prompts-file"], ["evaluate", "nowhere", "--prompts"]):
        done = CliRunner().invoke(app, [*command, str(path)])
        assert "no 'prompt'; there are text; set --column, or prompts.column in a recipe" in done.stderr
        done = CliRunner().invoke(app, [*command, str(path), "--column", "text"])
        assert "nowhere" in done.stderr  # the prompts are read; there is no such model


def test_folders_are_read_in_the_order_of_names(tmp_path: Path) -> None:
    folder = tmp_path / "captions"
    folder.mkdir()
    write(folder, "0002.txt", APPLE)
    write(folder, "0001.txt", FOX)
    write(folder, "0003.jsonl", json.dumps({"prompt": "a dog"}))
    write(folder, "0001.png", b"\x89PNG\0")
    write(folder, "._0001.txt", b"\0\5\x16\7")  # macOS writes such files to other file systems
    pq.write_table(pa.table({"prompt": [["a cat", "two cats"], ["a hen"]]}), folder / "0004.parquet")
    expected = [FOX, APPLE, "a dog", "a cat", "two cats", "a hen"]
    assert read_prompts(folder) == expected
    assert read_test_prompts(folder, 2) == expected[:2]
    opened = open_prompts(PromptSettings(source=str(folder), heldout_fraction=0))
    assert list(opened.texts("train")) == expected
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: no prompt files in it, and no encoded prompts"):
        read_prompts(tmp_path / "empty")


def test_typed_prompts_are_cleaned_like_those_of_files(tmp_path: Path, tiny_folder: Path) -> None:
    images = []
    for name, prompt in (("clean", "a fox in the snow"), ("odd", " a fox\u2028in\tthe  snow \udcff")):
        out = tmp_path / f"{name}.png"
        done = CliRunner().invoke(app, ["generate", str(tiny_folder), prompt, "--steps", "1", "-o", str(out)])
        assert done.exit_code == 0, done.output
        images.append(out.read_bytes())
    assert images[0] == images[1]


@pytest.mark.parametrize("option", ["prompts", "negative_prompt", "system_prompt", "assistant_prefix"])
def test_text_that_cannot_be_encoded_is_refused_in_python(tiny: TextToImagePipeline, option: str) -> None:
    options = {"prompts": "a fox", "steps": 1, "guidance_scale": 1.0} | {option: "a smiling cat \ud83d"}
    prompts = options.pop("prompts")
    with pytest.raises(
        UserError, match=r"not valid Unicode: remove the lone surrogate at the end of '.*a smiling cat \\\\?ud83d'"
    ):
        api.generate(tiny, prompts, **options)


def test_clean_prompts_stay_as_they_are() -> None:
    for text in (FOX, "蓝色背景上的红苹果", "می‌خواهم", "क्‍ष", 'naïve 5" (screen)'):
        assert clean_prompt(text) == text
        assert clean_prompt(clean_prompt(f" {text}\u200b\n")) == text


def test_prompts_that_look_the_same_count_as_one() -> None:
    assert comparison_key("A  Red\u00a0FOX\u200b") == comparison_key("a red fox")
    assert comparison_key("ﬁre １２") == comparison_key("fire 12")
    assert comparison_key("a red fox") != comparison_key("a red ox")


def splits(source: Path, **options: object) -> dict[str, list[str]]:
    opened = open_prompts(PromptSettings(source=str(source), **options))
    return {name: list(opened.texts(name)) for name in ("train", "validation", "test")}


def test_prompts_that_look_the_same_are_in_one_split(tmp_path: Path) -> None:
    texts = [f"A Prompt {i}" for i in range(100)] + [f"a prompt  {i}" for i in range(100)]
    parts = splits(write(tmp_path, "a.txt", "\n".join(texts)), heldout_fraction=0.2)
    keys = {name: {comparison_key(text) for text in part} for name, part in parts.items()}
    assert sum(map(len, parts.values())) == 200
    assert sum(map(len, keys.values())) == 100


def test_files_that_repeat_prompts_of_other_splits_are_reported(tmp_path: Path) -> None:
    source = write(tmp_path, "train.txt", "\n".join(["A fox", *(f"p {i}" for i in range(20))]))
    test = write(tmp_path, "test.jsonl", '{"prompt": "a  FOX"}\n{"prompt": "a hen"}\n')
    validation = write(tmp_path, "validation.csv", "prompt\nA HEN\na cat\n")
    with pytest.warns(UserWarning, match="they are not trained on") as caught:
        parts = splits(source, test_source=str(test), validation_source=str(validation))
    assert parts["test"] == ["a FOX", "a hen"]
    assert parts["validation"] == ["a cat"]
    assert "A fox" not in parts["train"]
    messages = [str(one.message) for one in caught]
    assert f"{test}: 1 test prompts are also in prompts.source; they are not trained on" in messages
    assert f"{validation}: 1 validation prompts are also test prompts; they are used for test only" in messages


def test_a_run_never_trains_on_the_prompts_it_is_measured_on() -> None:
    check_held_out({"prompts": [FOX]}, ["a hen"], [APPLE])
    with pytest.raises(UserError, match=r"^stage one, prompts: 1 prompts are also test prompts, such as 'A red apple'"):
        check_held_out({"stage one, prompts": [FOX, "A red apple"]}, ["a hen"], [APPLE])
    with pytest.raises(UserError, match=r"are also validation prompts, such as 'a hen'"):
        check_held_out({"prompts": ["a hen"]}, ["A hen"], [APPLE])
    with pytest.raises(UserError, match=r"are also test prompts, such as 'A red apple'"):
        check_held_out({"prompts": [FOX]}, ["A red apple"], [APPLE])


def test_stages_that_train_on_test_prompts_are_refused(tmp_path: Path, tiny_folder: Path) -> None:
    first = write(tmp_path, "first.txt", "\n".join(f"p {i}" for i in range(20)))
    second = write(tmp_path, "second.txt", "\n".join(f"q {i}" for i in range(20)))
    test = write(tmp_path, "test.txt", "\n".join(f"P {i}" for i in range(20)))
    stage = """
      student: {steps: 2}
      method: {name: trajectory}
      optim: {student: {lr: 1.0e-3}}
      train: {steps: 1, batch_size: 2}"""
    recipe = write(
        tmp_path,
        "recipe.yaml",
        f"""
kind: stages
name: overlapping
teacher: {tiny_folder}
stages:
    - name: one
      prompts: {{source: {first}}}{stage}
    - name: two
      prompts: {{source: {second}, test_source: {test}}}{stage}
""",
    )
    with pytest.raises(UserError, match=r"stage one, prompts: \d+ prompts are also test prompts, such as 'p "):
        api.distill(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()
