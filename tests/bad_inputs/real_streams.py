"""WebDataset shards of real latents and images that cannot be read, or do not fit the model."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from real_setup import SHAPE, image_bytes, latent_of, npy
from safetensors.torch import save
from stream_setup import write_tar
from wan_setup import save_wan

from bad_inputs.files import DISTILL, PROMPTS, STAGES, folder
from bad_inputs.table import Case, Content, Message, Section

_GAN = "-s method.terms.gan={} -s 'optim.discriminator={lr: 0.001}'"
_FILES: dict[str, Content] = {"mine.yaml": DISTILL, "prompts.txt": PROMPTS}
_PROMPT = ("1.txt", "a wolf")
_STAGES = (
    STAGES
    + """\
  - name: first
    method: {name: dmd, real_source: a.tar, terms: {cfg_augmentation: {}, mmd: {}}}
    optim: {student: {lr: 0.01}}
    train: {steps: 1, batch_size: 2}
    prompts: {source: prompts.txt, heldout_fraction: 0}
  - name: second
    method: {name: dmd, terms: {cfg_augmentation: {}}}
    optim: {student: {lr: 0.01}}
    train: {steps: 1, batch_size: 2}
    prompts: {source: prompts.txt, validation_source: validation.txt, heldout_fraction: 0}
"""
)


def _source(source: str, expected: str, files: Mapping[str, Content]) -> Case:
    return Case(f"distill mine.yaml -s 'method.real_source={source}' {_GAN}", expected, {**_FILES, **files})


def _writer(members: Iterable[tuple[str, str | bytes]]) -> Callable[[Path], object]:
    return lambda path: write_tar(path, members)


def _shard(expected: str, *members: tuple[str, str | bytes]) -> Case:
    return _source("a.tar", expected, {"a.tar": _writer(members)})


SECTION = Section(
    "Streams of real latents and images",
    "[Real data](../guides/real-data.md) describes the shards. The first sample is checked before a run begins.",
    (
        Message(
            "method.real_source={source}: no .tar file or folder of them{...}, and no image source; image sources: "
            "{names}",
            "Name a shard, several as `latents-{000..099}.tar`, a folder of them, `teacher` or an image source.",
            _source("emojis", "method.real_source=emojis", {}),
            _source("latents.parquet", "method.real_source=latents.parquet", {"latents.parquet": b""}),
            _source("a-{0..1}.tar", "(missing: a-1.tar)", {"a-0.tar": _writer([])}),
        ),
        Message(
            "method.real_source={folder}: no .tar files in this folder; shards of latents or images are expected",
            "Subfolders are not searched.",
            _source("empty", "method.real_source=empty", {"empty": folder}),
        ),
        Message(
            "{source}: no samples to train on in it",
            "The shards are empty, or all their prompts are validation or test prompts.",
            _shard("a.tar: no samples", ("1.cls", "3")),
        ),
        Message(
            "{file}, sample {key}: no latent and no image; it needs a member of {extensions}",
            "Members of one sample have one name, and follow each other in the shard.",
            _shard("a.tar, sample 1: no latent", _PROMPT),
        ),
        Message(
            "{file}, sample {key}: no prompt; it needs a .txt member, or a .json member that has it",
            "Members of one sample have one name, and follow each other in the shard.",
            _shard("a.tar, sample 1: no prompt", ("1.npy", npy(latent_of(1)))),
        ),
        Message(
            "{file}, sample {key}: no '{column}'; there are {names}; set --column, or prompts.column in a recipe",
            "The sample has no `.txt` member, and its `.json` member has no such key.",
            _shard("a.tar, sample 1: no 'prompt'", ("1.npy", npy(latent_of(1))), ("1.json", '{"caption": "a wolf"}')),
        ),
        Message(
            "{file}, sample {key}, .{extension}: a latent of shape {shape}, where the model's has {shape} at {size}; "
            "encode the images with this model at this size, or set resolution",
            "Latents are of one model and one size.",
            _shard("shape [16, 4, 8]", ("1.npy", npy(latent_of(1, (16, 4, 8)))), _PROMPT),
            _shard("shape [1, 16, 8, 8]", ("1.safetensors", save({"x": latent_of(1)[None]})), _PROMPT),
        ),
        Message(
            "{file}, sample {key}, .{extension}: a latent with values that are not finite; encode the image again in "
            "fp32",
            "It has NaN or infinite values, as fp16 may give.",
            _shard("sample 1, .npy", ("1.npy", npy(torch.full(SHAPE, torch.inf))), _PROMPT),
        ),
        Message(
            "{file}, sample {key}, .{extension}: a latent of dtype {dtype}; write it in fp16, bf16 (.safetensors) or "
            "fp32",
            "NumPy has no bf16: write it as `.safetensors`.",
            _shard("dtype int64", ("1.npy", npy(np.zeros(SHAPE, np.int64))), _PROMPT),
            _shard("dtype torch.uint8", ("1.safetensors", save({"x": torch.zeros(SHAPE).byte()})), _PROMPT),
        ),
        Message(
            "{file}, sample {key}, .{extension}: cannot be read ({reason}); write the latent again",
            "The member is damaged, or holds a pickled object.",
            _shard("sample 1, .npy: cannot be read", ("1.npy", npy(latent_of(1))[:500]), _PROMPT),
            _shard("sample 1, .npy: cannot be read", ("1.npy", npy(np.array([None]))), _PROMPT),
            _shard("sample 1, .safetensors", ("1.safetensors", b"no tensors"), _PROMPT),
        ),
        Message(
            "{file}, sample {key}, .safetensors: {count} tensors, where one latent is expected",
            "Write a sample for each latent.",
            _shard("2 tensors", ("1.safetensors", save({"x": latent_of(1), "y": latent_of(2)})), _PROMPT),
        ),
        Message(
            "{file}, sample {key}, .{extension}: cannot be opened ({reason}); write the image again, or leave it out",
            "The image is damaged, or of a kind that its extension does not say.",
            _shard("sample 1, .jpg: cannot be opened", ("1.jpg", b"no image"), _PROMPT),
            _shard("sample 1, .png: cannot be opened (damaged", ("1.png", image_bytes(1)[:900]), _PROMPT),
        ),
        Message(
            "{file}, sample {key}, .{extension}: an image, where the model makes videos of {count} frames; give "
            "latents",
            "Or train with `frames: 1`.",
            Case(
                f"distill mine.yaml -s teacher=wan -s frames=5 -s resolution=32 -s method.real_source=a.tar {_GAN}",
                "a.tar, sample 1, .png: an image",
                {**_FILES, "wan": save_wan, "a.tar": _writer([("1.png", image_bytes(1)), _PROMPT])},
            ),
        ),
        Message(
            "stage {name}, method.real_source: these samples may have the last stage's validation and test prompts; "
            "set prompts of this stage as there",
            "Samples of a stage's own validation and test prompts are left out, and must be those of the last stage.",
            Case(
                "distill mine.yaml",
                "stage first, method.real_source",
                {"mine.yaml": _STAGES, "prompts.txt": PROMPTS, "validation.txt": "a wolf\n"},
            ),
        ),
    ),
)
