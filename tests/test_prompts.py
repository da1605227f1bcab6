"""Prompt lists: read from any file, cleaned, encoded in shards, resumed, and distilled on."""

import csv
import json
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from fewstep import api
from fewstep.cli.main import app
from fewstep.data import prepare_prompts as preparing
from fewstep.data.prepare_prompts import CleaningStats, prepare_prompts, script_of
from fewstep.data.prompt_files import read_texts
from fewstep.data.prompt_shards import PromptShards
from fewstep.errors import UserError

TEXTS = ["a fox", "", "蓝色背景上的红苹果", 'with "quotes", and a comma', "a fox"]


def write(folder, kind):
    path = folder / f"prompts.{kind}"
    if kind == "txt":
        path.write_text("\n".join(TEXTS) + "\n", encoding="utf-8-sig")
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({"id": i, "prompt": t}) + "\n" for i, t in enumerate(TEXTS)))
    elif kind == "csv":
        with path.open("w", newline="", encoding="utf-8") as stream:
            rows = csv.writer(stream)
            rows.writerow(["id", "prompt"])
            rows.writerows(enumerate(TEXTS))
    else:
        pq.write_table(pa.table({"id": range(len(TEXTS)), "prompt": TEXTS}), path)
    return path


@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv", "parquet"])
def test_every_file_format_gives_the_same_prompts(tmp_path, kind):
    assert list(read_texts(str(write(tmp_path, kind)))) == TEXTS


def test_missing_values_become_empty(tmp_path):
    file = tmp_path / "odd.jsonl"
    file.write_text('{"prompt": null}\n"bare"\n\n{"prompt": []}\n')
    assert list(read_texts(str(file))) == ["", "bare", ""]
    pq.write_table(pa.table({"prompt": ["a", None]}), tmp_path / "odd.parquet")
    assert list(read_texts(str(tmp_path / "odd.parquet"))) == ["a", ""]


def test_quoted_csv_fields_may_span_lines(tmp_path):
    file = tmp_path / "long.csv"
    file.write_text('prompt,n\n"first\nsecond",1\n')
    assert list(read_texts(str(file))) == ["first second"]


MISTAKES = {
    "none.txt": (None, "No such file or folder"),
    "list.pdf": (b"%PDF-1.7\n\xe2\xe3", "not a text file; prompts come from .txt, .jsonl, .json, .csv"),
    "bad.jsonl": (b'{"prompt": "a"}\n{"prom', "bad.jsonl, line 2: not JSON"),
    "other.jsonl": (b'{"text": "a"}\n', "line 1: no 'prompt'; there are text; set --column"),
    "other.csv": (b"text,n\na,1\n", "no 'prompt'; there are text, n"),
    "bytes.txt": (b"\xff\xfe\xfa", "not a UTF-8 text file"),
    "no.parquet": (b"PAR", "not a parquet file"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_errors_name_the_file_and_line(tmp_path, name):
    content, message = MISTAKES[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        list(read_texts(str(tmp_path / name)))
    assert name in str(error.value)


def test_missing_libraries_are_named_with_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"need pyarrow; pip install 'fewstep\[prompts\]'"):
        list(read_texts(str(write(tmp_path, "parquet"))))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="need datasets"):
        list(read_texts("hf:someone/something"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a fox", "Latin script"),
        ("un café", "Latin script"),
        ("蓝色背景上的红苹果, twemoji", "Chinese"),
        ("赤いりんごの絵", "Japanese"),
        ("빨간 사과", "Korean"),
        ("красное яблоко", "Cyrillic script"),
        ("123 !?", "no letters"),
    ],
)
def test_script_of_a_prompt(text, expected):
    assert script_of(text) == expected


def make(source, model, out, **options):
    return prepare_prompts([str(source)], model.encoder, out, **options)


def test_prompts_are_cleaned_and_encoded_as_by_the_model(tmp_path, tiny):
    file = tmp_path / "prompts.txt"
    file.write_text("a fox\n\n  a   fox \n蓝色背景上的红苹果\n" + "word " * 300 + "\na dog\n", encoding="utf-8")
    report = make(file, tiny, tmp_path / "out", shard_size=2, max_tokens=100)
    assert (report.read, report.empty, report.duplicate, report.too_long, report.kept) == (6, 1, 1, 1, 3)
    shards = PromptShards(tmp_path / "out")
    assert list(shards) == ["a fox", "蓝色背景上的红苹果", "a dog"]
    assert shards[-1] == "a dog"
    assert shards[1:] == ["蓝色背景上的红苹果", "a dog"]
    expected, found = tiny.encode(["a dog", "a fox"]), shards.encoded([2, 0])
    assert torch.equal(found.lengths, expected.lengths)
    torch.testing.assert_close(found.features, expected.features, atol=1e-5, rtol=1e-5)
    summary = json.loads((tmp_path / "out" / "index.json").read_text())["report"]
    assert summary["languages"] == {"Latin script": 2, "Chinese": 1}
    assert summary["tokens"]["longest"] == tiny.encoder.count("蓝色背景上的红苹果")


def test_interrupted_call_resumes_with_the_same_result(tmp_path, tiny, monkeypatch):
    file = tmp_path / "prompts.txt"
    file.write_text("".join(f"prompt number {i % 37}\n" for i in range(60)))
    whole = make(file, tiny, tmp_path / "whole", shard_size=10)

    written = preparing.write_prompt_shard

    def interrupted(folder, number, texts, features):
        if number == 2:
            raise KeyboardInterrupt
        written(folder, number, texts, features)

    monkeypatch.setattr(preparing, "write_prompt_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(file, tiny, tmp_path / "parts", shard_size=10)
    monkeypatch.undo()
    with pytest.raises(UserError, match="no encoded prompts in it"):
        PromptShards(tmp_path / "parts")
    with pytest.raises(UserError, match="unfinished prompts with another max_tokens"):
        make(file, tiny, tmp_path / "parts", shard_size=10, max_tokens=50)
    parts = make(file, tiny, tmp_path / "parts", shard_size=10)
    assert parts == whole
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == sorted(
        path.name for path in (tmp_path / "whole").iterdir()
    )
    for file in (tmp_path / "whole").glob("shard-*"):
        assert file.read_bytes() == (tmp_path / "parts" / file.name).read_bytes()


def test_finished_prompts_and_other_folders_are_refused(tmp_path, tiny):
    file = write(tmp_path, "txt")
    make(file, tiny, tmp_path / "out")
    with pytest.raises(UserError, match="already holds encoded prompts"):
        make(file, tiny, tmp_path / "out")
    assert make(file, tiny, tmp_path / "out", overwrite=True).kept == 3
    (tmp_path / "out" / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match=r"mine.txt was not written by fewstep encode-prompts"):
        make(file, tiny, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "mine.txt").read_text() == "precious"
    (tmp_path / "blank.txt").write_text("\n\n")
    with pytest.raises(UserError, match="none of the 2 prompts was kept"):
        make(tmp_path / "blank.txt", tiny, tmp_path / "none")


def test_files_are_read_lazily(tmp_path):
    """The first prompts are available before the last line is read."""
    file = tmp_path / "many.txt"
    file.write_text("".join(f"{i}\n" for i in range(200_000)))
    first = read_texts(str(file))
    assert [next(first) for _ in range(3)] == ["0", "1", "2"]


def test_tokens_per_batch_are_bounded(tiny, monkeypatch):
    """The activations of all layers are in memory together, for one batch."""
    texts = ["a fox", "a very long story of a fox and a dog " * 8, "a dog", "a red apple", "eine Katze"]
    expected, seen = tiny.encoder.encode_uncached(texts), []
    monkeypatch.setattr("fewstep.models.text.MAX_TOKENS_PER_BATCH", 200)
    handle = tiny.text_encoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    try:
        found = tiny.encoder.encode_uncached(texts)
    finally:
        handle.remove()
    assert sum(rows for rows, _ in seen) == len(texts)
    assert max(rows for rows, _ in seen) > 1
    assert all(rows == 1 or rows * longest <= 200 for rows, longest in seen)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_features_do_not_depend_on_autocast(tiny):
    with torch.autocast("cpu", torch.bfloat16):
        found = tiny.encoder.encode_uncached(["a fox of fp32"])[0]
    assert torch.equal(found, tiny.encoder.encode_uncached(["a fox of fp32"])[0])


@pytest.mark.parametrize("base", ["bf16", "fp8"])
def test_prompts_fit_a_text_encoder_of_another_dtype(tmp_path, tiny, tiny_folder, base):
    """Encoded in fp32, used with the same weights in another data type."""
    (tmp_path / "prompts.txt").write_text("a fox\na red apple\n")
    make(tmp_path / "prompts.txt", tiny, tmp_path / "shards")
    overrides = [
        f"teacher={tiny_folder}", f"prompts.source={tmp_path / 'shards'}", "models.train=lora", "models.rank=2",
        f"models.frozen_dtype={base}", "train.steps=1", "train.batch_size=2", "train.sample_every=0",
        "evaluate.enabled=false", "evaluate.validate_every=0",
    ]  # fmt: skip
    assert api.distill("micro-decoupled", tmp_path / "run", overrides=overrides).student.is_dir()


def test_quantiles_of_lengths():
    report = CleaningStats(kept=10)
    report.tokens.update([5] * 5 + [6] * 4 + [50])
    assert (report.quantile(0.5), report.quantile(0.9), report.quantile(1)) == (5, 6, 50)


def test_encoded_prompts_give_the_same_student_as_a_text_file(tmp_path, tiny, tiny_folder):
    """And prompts from another text encoder are refused."""
    file = tmp_path / "prompts.txt"
    file.write_text("a fox on a blue background\na red apple\n紫色背景上的红苹果\n", encoding="utf-8")
    arguments = [str(file), "--out", str(tmp_path / "shards"), "--model", str(tiny_folder), "--shard-size", "2"]
    done = CliRunner().invoke(app, ["encode-prompts", *arguments])
    assert done.exit_code == 0, done.output
    assert "3 of 3 prompts kept" in done.output
    assert "Latin script 66.7%, Chinese 33.3%" in done.output
    short = [f"teacher={tiny_folder}", "train.steps=2", "train.batch_size=2", "train.sample_every=0"]
    students = []
    for source in (file, tmp_path / "shards"):
        more = ["train.precision=fp32", "evaluate={enabled: false}", f"prompts.source={source}"]
        made = api.distill("micro-decoupled", tmp_path / f"run-{source.name}", overrides=[*short, *more])
        students.append(api.load(made.student).transformer.state_dict())
    for name, tensor in students[0].items():
        torch.testing.assert_close(tensor, students[1][name], atol=1e-5, rtol=1e-4)
    index = json.loads((tmp_path / "shards" / "index.json").read_text())
    index["fingerprint"]["text_encoder"] = "another"
    (tmp_path / "shards" / "index.json").write_text(json.dumps(index))
    more = ["train.precision=fp32", "evaluate={enabled: false}", f"prompts.source={tmp_path / 'shards'}"]
    with pytest.raises(UserError, match="was made with another text_encoder"):
        api.distill("micro-decoupled", tmp_path / "refused", overrides=[*short, *more])
