"""Streams of prompts: shuffled, divided between processes and workers, in bounded memory, and resumed exactly."""

import itertools
import json
import os
import pickle
import re
import signal
import subprocess
import sys

import pytest
import torch
from process_runs import OPTIONS, command, distill, wait_for_checkpoint, weights
from stream_setup import KINDS, all_prompts, shard_prompts, write_source, write_tar

from fewstep import api
from fewstep.config.sections import PromptSettings
from fewstep.core.method import Shard
from fewstep.data import stream_batches
from fewstep.data.prompt_batches import prompt_batches
from fewstep.data.prompt_files import read_prompts
from fewstep.data.prompts import open_prompts, training_prompts
from fewstep.data.shuffled_stream import ShuffledStream
from fewstep.data.stream_batches import StreamBatches
from fewstep.errors import UserError


def stream(source, workers=0, buffer=8, **settings):
    own = {"num_workers": workers, "shuffle_buffer": buffer}
    return training_prompts(open_prompts(PromptSettings(source=str(source), stream=own, **settings)))


def take(loader, count):
    return list(itertools.islice(iter(loader), count))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("workers", "processes", "shards"), [(0, 1, 4), (2, 1, 4), (0, 2, 4), (2, 2, 4), (0, 2, 3)])
def test_an_epoch_is_complete_and_no_prompt_is_read_twice(tmp_path, kind, workers, processes, shards):
    prompts, expected = stream(write_source(tmp_path / "data", kind, shards), workers), all_prompts(shards)
    parts = [take(prompts.loader(0, Shard(rank, processes)), len(expected) // processes) for rank in range(processes)]
    found = [text for part in parts for text in part]
    assert sorted(found) == sorted(expected)
    assert found != expected


def test_the_order_depends_on_the_seed_and_the_epoch(tmp_path):
    prompts = stream(write_source(tmp_path / "data", "txt"))
    count = len(all_prompts())
    both = take(prompts.loader(0, Shard()), 2 * count)
    first, second = both[:count], both[count:]
    assert sorted(first) == sorted(second)
    assert first != second
    assert take(prompts.loader(0, Shard()), count) == first
    assert take(prompts.loader(1, Shard()), count) != first


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("workers", "shard"),
    [(0, Shard()), pytest.param(2, Shard(), marks=pytest.mark.slow), (2, Shard(1, 2))],
)
def test_resumed_stream_goes_on_with_the_same_prompts(tmp_path, kind, workers, shard):
    """From within a block, at its end, and in the second epoch; the state is what a checkpoint's JSON keeps of it."""
    prompts = stream(write_source(tmp_path / "data", kind), workers)
    count = len(all_prompts()) // shard.world_size
    whole = take(prompts.loader(0, shard), 4 * count)
    for used in (3, count + 5) if workers else (0, 3, 8, count, count + 5):
        loader = prompts.loader(0, shard)
        taken = take(loader, used)
        state = json.loads(json.dumps(loader.state_dict()))
        resumed = prompts.loader(0, shard)
        resumed.load_state_dict(state)
        assert taken + take(resumed, 2 * count) == whole[: used + 2 * count]


def test_memory_is_bounded_by_the_buffer():
    from datasets import IterableDataset

    read = []

    def rows(files):
        for number in itertools.count():  # a source without end
            read.append(number)
            yield {"text": str(number)}

    dataset = IterableDataset.from_generator(rows, gen_kwargs={"files": ["one"]})
    items = iter(ShuffledStream(dataset, lambda row: [row["text"]], 10, 0, "numbers"))
    first = list(itertools.islice(items, 10))
    assert read == list(range(10))
    assert sorted(map(int, first)) == read


def test_validation_and_test_prompts_are_left_out(tmp_path):
    held_out = {"validation": shard_prompts(0)[:2], "test": shard_prompts(1)[:3]}
    files = {}
    for split, texts in held_out.items():
        (tmp_path / f"{split}.txt").write_text("\n".join(text.upper() for text in texts))
        files[f"{split}_source"] = str(tmp_path / f"{split}.txt")
    settings = PromptSettings(source=write_source(tmp_path / "data", "tar"), stream={"shuffle_buffer": 8}, **files)
    source = open_prompts(settings)
    assert {split: [text.lower() for text in source.texts(split)] for split in held_out} == held_out
    expected = sorted(set(all_prompts()) - {text for texts in held_out.values() for text in texts})
    assert sorted(take(training_prompts(source).loader(0, Shard()), len(expected))) == expected


def test_one_prompt_of_a_sample(tmp_path):
    """The column of the .json member, else the .txt member; several prompts in a list."""
    samples = {
        "a.txt": "the txt member",
        "a.json": json.dumps({"prompt": "the json member"}),
        "b.json": json.dumps({"size": 3}),
        "b.txt": " only  txt\n",
        "c.json": json.dumps({"prompt": ["one", "two"]}),
        "d.jpg": b"an image without a prompt",
        "sub.dir/e.TXT": "a folder",
    }
    path = write_tar(tmp_path / "shard.tar", samples.items())
    assert read_prompts(path) == ["the json member", "only txt", "one", "two", "a folder"]
    del samples["c.json"]
    assert read_prompts(write_tar(path, samples.items()), "caption") == ["the txt member", "only txt", "a folder"]


@pytest.mark.parametrize("name", ["a.pyd", "a.pickle", "a.image.PKL", "a.pth"])
def test_pickles_are_refused_and_never_loaded(tmp_path, name):
    class Harmful:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())

    path = write_tar(tmp_path / "shard.tar", [("a.txt", "a fox"), (name, pickle.dumps(Harmful()))])
    with pytest.raises(UserError, match=r"shard.tar: a\..* is a pickle"):
        read_prompts(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_mistake_in_a_shard_is_one_line(tmp_path, tiny, workers):
    good = [(f"{row}.txt", text) for row, text in enumerate(shard_prompts(0))]
    write_tar(tmp_path / "0.tar", [*good, ("x.json", '{"caption": "no prompt"}')])
    source = prompt_batches(tiny, stream(tmp_path / "0.tar", workers), 4, 0)
    with pytest.raises(UserError) as error:
        source(0, Shard())
    assert str(error.value) == (
        f"{tmp_path}/0.tar, sample x: no 'prompt'; there are caption; set --column, or prompts.column in a recipe"
    )


@pytest.mark.parametrize(
    ("module", "kind"), [("torchdata.stateful_dataloader", "txt"), ("webdataset.tariterators", "tar")]
)
def test_missing_packages_are_named_with_the_extra(tmp_path, monkeypatch, module, kind):
    source = write_source(tmp_path / "data", kind)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"{module.split('.')[0]}.*; pip install 'fewstep\[stream\]'"):
        stream(source).first(1, None)


@pytest.mark.parametrize("content", [b"no tar file", b""])
def test_what_is_no_tar_file_is_named(tmp_path, content):
    (tmp_path / "0.tar").write_bytes(content)
    with pytest.raises(UserError, match=r"0.tar: cannot be read .*not a tar file, or a damaged one"):
        read_prompts(tmp_path / "0.tar")


def test_batches_resume_bit_exactly_and_skip_long_prompts(tmp_path, tiny, monkeypatch, capsys):
    """Also where prompts are read ahead and encoded together, in the middle of those."""
    monkeypatch.setattr(stream_batches, "ENCODED", 12)
    (tmp_path / "prompts.txt").write_text("\n".join([*all_prompts(), "fox " * 600, "wolf " * 600]))
    prompts = stream(tmp_path / "prompts.txt")

    def batches(state, first, last):
        source = prompt_batches(tiny, prompts, 4, 0)
        assert isinstance(source, StreamBatches)
        source.load_state_dict(json.loads(json.dumps(state)))
        return [source(position, Shard()) for position in range(first, last)], source.state_dict()

    start = prompt_batches(tiny, prompts, 4, 0).state_dict()
    whole, _ = batches(start, 0, 40)
    assert sorted(text for batch in whole[:30] for text in batch.texts) == sorted(all_prompts())
    assert capsys.readouterr().err == f"{tmp_path}/prompts.txt: prompts of more than 512 tokens are left out\n"
    for cut in (1, 3, 5, 31):
        _, state = batches(start, 0, cut)
        for found, expected in zip(batches(state, cut, cut + 8)[0], whole[cut:], strict=False):
            assert found.texts == expected.texts
            assert torch.equal(found.noise, expected.noise)
            assert torch.equal(found.prompts.features, expected.prompts.features)
    with pytest.raises(ValueError, match="batch 7 of a stream whose next batch is 0"):
        prompt_batches(tiny, prompts, 4, 0)(7, Shard())


def subprocess_of(words):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert [name for name, tensor in one.items() if not torch.equal(tensor, other[name])] == []


def options(folder, workers):
    return (
        f"prompts.source={write_source(folder, 'tar')}",
        f"prompts.stream={{num_workers: {workers}, shuffle_buffer: 8}}",
    )


def test_training_in_two_parts_equals_one(tiny_folder, tmp_path):
    more = [f"teacher={tiny_folder}", *OPTIONS, *options(tmp_path / "data", 0)]
    for out, steps in (("whole", 4), ("parts", 2), ("parts", 4)):
        api.distill("micro-aligned", tmp_path / out, overrides=[*more, f"train.steps={steps}"])
    assert_equal(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_interrupted_training_equals_an_uninterrupted_one(tiny_folder, tmp_path, number):
    """After a checkpoint, while two workers read. SIGINT reaches them too, as Ctrl-C does."""
    more = options(tmp_path / "data", 2)
    distill(tiny_folder, tmp_path / "whole", 1, "train.steps=6", *more)
    started = subprocess_of(command(tiny_folder, tmp_path / "parts", 1, "train.steps=6", *more))
    wait_for_checkpoint(started, tmp_path / "parts")
    if number == signal.SIGINT:
        os.killpg(started.pid, number)
        assert re.search(r"saved step \d/6; resume with", started.communicate()[1])
    else:
        started.kill()
        started.communicate()
    resumed = distill(tiny_folder, tmp_path / "parts", 1, "train.steps=6", *more)
    assert "resuming from step" in resumed.stderr
    assert_equal(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


@pytest.mark.slow
def test_two_processes_resume_exactly_and_one_cannot_go_on_for_them(tiny_folder, tmp_path):
    more = options(tmp_path / "data", 2)
    distill(tiny_folder, tmp_path / "whole", 2, "train.steps=4", *more)
    distill(tiny_folder, tmp_path / "parts", 2, "train.steps=2", *more)
    with pytest.raises(AssertionError, match=r"2 processes read the run's stream, which 1 cannot resume; start 2"):
        distill(tiny_folder, tmp_path / "parts", 1, "train.steps=4", *more)
    distill(tiny_folder, tmp_path / "parts", 2, "train.steps=4", *more)
    assert_equal(weights(tmp_path / "parts"), weights(tmp_path / "whole"))
