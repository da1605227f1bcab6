"""Prompts that cannot be read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lumina2_setup import save_lumina2

from bad_inputs.files import CACHE, DISTILL, PROMPTS, folder, link_loop
from bad_inputs.lora_train import LORA_RUN
from bad_inputs.table import Case, Content, Message, Section

LONG = "fox " * 600
_RECIPE = {"mine.yaml": DISTILL, "prompts.txt": PROMPTS}


def _encode(source: str, expected: str, content: Content) -> Case:
    return Case(f"encode-prompts {source} --out shards --model tiny", expected, {source: content})


def _generate(source: str, expected: str, content: Content) -> Case:
    return Case(f"generate tiny --prompts-file {source}", expected, {source: content})


def _lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _parquet(column: str, values: list[Any], damaged: bool = False) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        from pyarrow import parquet, table

        parquet.write_table(table({column: values}), path)
        if damaged:
            content = bytearray(path.read_bytes())
            content[4:20] = b"\xff" * 16
            path.write_bytes(bytes(content))

    return write


SECTION = Section(
    "Prompts",
    "[Prompts](../guides/prompts.md) describes all formats.",
    (
        Message(
            "no prompts: give some, or --prompts-file",
            "Every word after the model is a prompt; quote prompts with spaces.",
            Case("generate tiny", "no prompts"),
        ),
        Message(
            "prompt has {count} tokens, at most {limit} fit: {prompt}",
            "Shorten it.",
            Case(f"generate tiny '{LONG}'", "at most 512 fit"),
            Case(f"generate tiny 'a fox' --guidance-scale 2 --negative-prompt '{LONG}'", "at most 512 fit"),
            Case(f"generate tiny 'a fox' --system-prompt '{LONG}'", "at most 512 fit"),
            Case(f"generate tiny 'a fox' --assistant-prefix '{LONG}'", "at most 512 fit"),
            Case(f"generate lumina2 '{LONG}' --width 64 --height 64", "at most 256 fit", {"lumina2": save_lumina2}),
        ),
        Message(
            "{source}: No such file or folder; prompts come from {formats}",
            "Check the path. In recipes and for `evaluate`, `emoji` is a source too.",
            Case("generate tiny --prompts-file nowhere.txt", "nowhere.txt"),
            _generate("loop.txt", "loop.txt", link_loop),
            Case("evaluate tiny --prompts emojis", "emojis"),
            Case("encode-prompts nowhere.csv --out shards --model tiny", "nowhere.csv"),
            Case("lora adapter micro-turbo --out a.safetensors --prompts nowhere", "nowhere"),
            Case("lora choose run --prompts nowhere", "nowhere", LORA_RUN),
            Case("distill mine.yaml -s prompts.source=nowhere", "nowhere", _RECIPE),
            Case("distill mine.yaml -s prompts.validation_source=nowhere", "nowhere", _RECIPE),
            Case("distill mine.yaml -s prompts.test_source=nowhere", "nowhere", _RECIPE),
            Case("cache-trajectories cache.yaml -s prompts.source=nowhere", "nowhere", {"cache.yaml": CACHE}),
        ),
        Message(
            "{file}: no prompts in it; write one per line",
            "The file is empty, or has comments and blank lines only.",
            _generate("a.txt", "a.txt", ""),
            _generate("a.txt", "a.txt", "# a comment\n\n   \n"),
            Case("evaluate tiny --prompts a.txt", "a.txt", {"a.txt": "\n"}),
            Case("distill mine.yaml -s prompts.source=a.txt", "a.txt", _RECIPE | {"a.txt": "\n"}),
        ),
        Message(
            "{sources}: none of the {count} prompts was kept",
            "All prompts are empty or longer than `--max-tokens`.",
            _encode("a.txt", "none of the 1", f"{LONG}\n"),
            Case(
                "encode-prompts a.txt --out shards --model tiny --max-tokens 1", "none of the 1", {"a.txt": "a fox\n"}
            ),
        ),
        Message(
            "{folder}: no prompt files in it, and no encoded prompts; put some there, or run or resume fewstep "
            "encode-prompts",
            "The folder has no files that prompts are read from.",
            _generate("old", "old", folder),
            Case("distill mine.yaml -s prompts.source=old", "old", _RECIPE | {"old/notes.md": "mine"}),
        ),
        Message(
            "{file}, line {number}: not a UTF-8 text file; save it as UTF-8",
            "An editor saved the text in another encoding.",
            _generate("a.txt", "a.txt, line 2", "a fox\na café\n".encode("latin-1")),
            _encode("a.csv", "a.csv, line 2", "prompt\na café\n".encode("latin-1")),
            Case("evaluate tiny --prompts a.txt", "a.txt, line 1", {"a.txt": "café\n".encode("latin-1")}),
        ),
        Message(
            "{file}: UTF-16, not a UTF-8 text file; save it as UTF-8",
            "Windows tools write UTF-16 under the name Unicode.",
            _generate("a.txt", "a.txt", "a fox\n".encode("utf-16")),
            _encode("a.jsonl", "a.jsonl", '{"prompt": "a fox"}\n'.encode("utf-16")),
        ),
        Message(
            "{file}, line {number}: a NUL character; save the prompts as UTF-8 text",
            "The file is binary, or in UTF-16 without its mark.",
            _generate("a.txt", "line 1", b"a\0b\n"),
        ),
        Message(
            "{file}: not a text file; prompts come from {formats}",
            "The file is of a kind that holds no prompts.",
            _encode("a.docx", "a.docx", b"PK\x03\x04\0\0\xff\xfe"),
        ),
        Message(
            "{file}, line {number}: not JSON ({problem})",
            "Each line of a JSON Lines file is one object or text.",
            _encode("a.jsonl", "a.jsonl, line 2", '{"prompt": "a fox"}\n{"prompt": \n'),
            _generate("a.jsonl", "a.jsonl, line 1", "a fox\n"),
        ),
        Message(
            "{file}: not JSON ({problem})",
            "The file is incomplete, or no JSON.",
            _encode("a.json", "a.json", '["a fox", '),
        ),
        Message(
            "{place}: no '{column}'; there are {names}; set --column, or prompts.column in a recipe",
            "Name the column or key that holds the prompts.",
            Case(
                "prefs collect tiny a=tiny --prompts a.csv --out votes --column b",
                "a.csv: no 'b'; there are prompt",
                {"a.csv": "prompt\na fox\n"},
            ),
            _encode("a.csv", "a.csv: no 'prompt'; there are text, other", "text,other\na,b\n"),
            _encode("a.csv", "there are none", ""),
            _encode("a.jsonl", "a.jsonl, line 1: no 'prompt'; there are text", _lines({"text": "a fox"})),
            _encode("a.parquet", "a.parquet: no 'prompt'; there are text", _parquet("text", ["a fox"])),
            Case("generate tiny --prompts-file a.csv --column caption", "no 'caption'", {"a.csv": "prompt\na fox\n"}),
            Case("evaluate tiny --prompts a.csv --column caption", "no 'caption'", {"a.csv": "prompt\na fox\n"}),
            Case(
                "encode-prompts a.csv --out shards --model tiny --column caption",
                "no 'caption'",
                {"a.csv": "prompt\na fox\n"},
            ),
        ),
        Message(
            "{place}: two columns '{column}'; there are {names}; set --column, or prompts.column in a recipe",
            "Rename one of them.",
            _encode("a.csv", "two columns 'prompt'", "prompt,prompt\na,b\n"),
        ),
        Message(
            "{place}: {column} holds {kind}, where a text is expected",
            "Prompts are texts, or lists of texts.",
            _encode("a.jsonl", "prompt holds a number", _lines({"prompt": 3})),
            _encode("a.jsonl", "prompt holds an object", _lines({"prompt": {"en": "a fox"}})),
            _encode("a.parquet", "a.parquet, row 1: prompt holds a number", _parquet("prompt", [1, 2])),
        ),
        Message(
            "{file}, line {number}: {count} fields, but the header has {other}; put prompts with ',' in quotes",
            "A comma in a prompt begins another field.",
            _encode("a.csv", "a.csv, line 2: 3 fields, but the header has 2", "prompt,id\na fox, a bear,1\n"),
        ),
        Message(
            "{file}, line {number}: {problem}; close each quote, and double those in a prompt",
            "A quote in a CSV file is not closed.",
            _encode("a.csv", "a.csv, line 2", 'prompt\n"a fox\na bear\n'),
        ),
        Message(
            "{file}: cannot be read ({reason}); not a parquet file, or a damaged one",
            "Download or write the file again.",
            _encode("a.parquet", "a.parquet", b""),
            _encode("a.parquet", "a.parquet", b"PAR1 nothing"),
        ),
        Message(
            "{file}: cannot be read ({reason}); its first rows may be readable, the file is damaged",
            "Download or write the file again.",
            _encode("a.parquet", "a.parquet", _parquet("prompt", ["a fox"] * 1000, damaged=True)),
        ),
        Message(
            "{source}: every prompt is a validation or test prompt; none is left for training",
            "Training prompts that are also validation or test prompts are left out.",
            Case("distill mine.yaml -s prompts.test_source=prompts.txt", "none is left", _RECIPE),
        ),
        Message(
            "prompts.source={source}: {count} test prompts with evaluate.num_prompts={number}, at least 2 are needed; "
            "name a file in prompts.test_source, or set evaluate.enabled=false",
            "A short list has too few prompts to hold some out for the evaluation.",
            Case("distill mine.yaml -s evaluate.enabled=true", "at least 2 are needed", _RECIPE),
        ),
        Message(
            "prompts.source={source}: no validation prompts; name a file in prompts.validation_source, or set "
            "evaluate.validate_every=0",
            "No prompts are held out for validation.",
            Case(
                "distill mine.yaml -s evaluate.validate_every=1 -s prompts.heldout_fraction=0",
                "no validation prompts",
                _RECIPE,
            ),
        ),
    ),
)
