"""WebDataset shards that cannot be read, and recipes that cannot read a stream of prompts."""

import json
from pathlib import Path

from stream_setup import write_tar

from bad_inputs.files import CACHE, DISTILL, PROMPTS, STAGES
from bad_inputs.table import Case, Message, Section

_RECIPE = {"mine.yaml": DISTILL, "prompts.txt": PROMPTS}
_STREAM = "-s prompts.stream={}"
_STAGES = (
    STAGES
    + """\
  - name: first
    method: {name: dmd, terms: {cfg_augmentation: {}, distribution_matching: {}}}
    optim: {student: {lr: 0.01}, fake_score: {lr: 0.02}}
    train: {steps: 1, batch_size: 2}
    prompts: {source: prompts.txt, stream: {}}
  - name: second
    method: {name: dmd, terms: {cfg_augmentation: {}, distribution_matching: {}}}
    optim: {student: {lr: 0.01}, fake_score: {lr: 0.02}}
    train: {steps: 1, batch_size: 2}
    prompts: {source: prompts.txt}
"""
)


def _shard(expected: str, *members: tuple[str, str | bytes]) -> Case:
    def write(path: Path) -> None:
        write_tar(path, members)

    return Case("encode-prompts a.tar --out shards --model tiny", expected, {"a.tar": write})


SECTION = Section(
    "Streams of prompts",
    "[Streams](../guides/prompts.md#streams) describes WebDataset shards and `prompts.stream`.",
    (
        Message(
            "{file}: cannot be read ({reason}); not a tar file, or a damaged one",
            "Download or write the file again.",
            Case("encode-prompts a.tar --out shards --model tiny", "a.tar", {"a.tar": b"no tar file"}),
        ),
        Message(
            "{file}: {member} is a pickle, which can run any program; leave it out",
            "Write the shard without `.pyd`, `.pickle`, `.pkl`, `.pth` and `.pt` members.",
            _shard("a.tar: 1.pyd is a pickle", ("1.txt", "a fox"), ("1.pyd", b"\x80\x04.")),
        ),
        Message(
            "{file}: two members of one sample have the same name; write the shard again",
            "A sample has one member of each extension.",
            _shard("a.tar: two members", ("1.txt", "a fox"), ("1.txt", "a bear")),
        ),
        Message(
            "{file}, sample {key}: text that is not UTF-8",
            "Write the shard again with UTF-8 text.",
            _shard("a.tar, sample 1", ("1.txt", b"caf\xe9")),
        ),
        Message(
            "{file}, sample {key}: not JSON ({problem})",
            "The `.json` member is damaged.",
            _shard("a.tar, sample 1", ("1.json", "{")),
        ),
        Message(
            "{file}, sample {key}: no '{column}'; there are {names}; set --column, or prompts.column in a recipe",
            "The sample has no `.txt` member, and its `.json` member has no such key.",
            _shard("no 'prompt'; there are caption", ("1.json", json.dumps({"caption": "a fox"}))),
        ),
        Message(
            "{pattern}: its braces do not match; 100 files are shards-{000..099}.tar",
            "Put the pattern in quotes on the command line, so that the shell leaves it as it is.",
            Case("distill mine.yaml -s 'prompts.source=a-{0..3.tar'", "a-{0..3.tar", _RECIPE),
        ),
        Message(
            "prompts.source={source}: not a file, folder or dataset of texts, as prompts.stream needs; set "
            "prompts.stream=null",
            "Registered sources are lists in memory, and encoded prompts are read lazily without a stream.",
            Case(f"distill mine.yaml -s prompts.source=emoji {_STREAM}", "prompts.source=emoji", _RECIPE),
        ),
        Message(
            "prompts.source={source}: a list of prompts is needed here, and prompts.stream reads no list; set "
            "prompts.stream=null",
            "A cache of trajectories draws from all prompts.",
            Case(
                f"cache-trajectories mine.yaml --out cache {_STREAM}",
                "prompts.source=prompts.txt",
                {"mine.yaml": CACHE, "prompts.txt": PROMPTS},
            ),
        ),
        Message(
            "{recipe}: prompts.stream: method {name} samples the teacher's trajectories here, for a list of prompts; "
            "name a cache in trajectory.cache, or set prompts.stream=null",
            "Trajectories are sampled before the training, of prompts drawn from a list.",
            Case(
                f"distill mine.yaml -s method.terms.trajectory_mse={{}} {_STREAM}",
                "prompts.stream: method dmd",
                _RECIPE,
            ),
        ),
        Message(
            "stage {name}, prompts: this stream does not leave out the last stage's validation and test prompts; set "
            "prompts.validation_source and prompts.test_source as there",
            "A stage must not train on the prompts that the run is measured on.",
            Case("distill mine.yaml", "stage first, prompts", {"mine.yaml": _STAGES, "prompts.txt": PROMPTS}),
        ),
    ),
)
