"""Transformers as single files, for ``fewstep convert``."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bad_inputs.files import TRANSFORMER, folder
from bad_inputs.table import Case, Content, Message, Section


def _convert(expected: str, content: Content, name: str = "a.safetensors") -> Case:
    return Case(f"convert {name} --out model --components-from tiny", expected, {name: content})


def _tensors(change: Callable[[dict[str, Tensor]], dict[str, Tensor]], file: str = TRANSFORMER) -> Content:
    """A single file of the tensors of ``tiny``, changed."""
    return lambda path: save_file(change(load_file(file)), Path(path))


def _prefixed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"strange.{name}": tensor for name, tensor in tensors.items()}


def _incomplete(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name != "x_pad_token"}


def _truncated(path: Path) -> None:
    path.write_bytes(Path(TRANSFORMER).read_bytes()[:9000])


VAE = "tiny/vae/diffusion_pytorch_model.safetensors"
OTHER_FAMILY = {"joint_blocks.0.x_block.attn.qkv.weight": torch.zeros(6, 2)}
LORA = {"layers.0.attention.to_q.lora_A.weight": torch.zeros(2, 2)}

SECTION = Section(
    "Single files",
    "[Checkpoint formats](../guides/checkpoint-formats.md) has the names and formats that `fewstep convert` reads.",
    (
        Message(
            "{file}: contains the transformer alone; give --components-from, a model of its family",
            "A single file has no text encoder and no autoencoder: name a model that has them.",
            Case(f"convert {TRANSFORMER} --out model", TRANSFORMER),
        ),
        Message(
            "--components-from: no effect on {model}, which is not a single file; leave it out",
            "A model's folder has its own components.",
            Case("convert tiny --out model --components-from micro", "--components-from"),
        ),
        Message(
            "{file}: no such file",
            "Check the path.",
            Case("convert nowhere.safetensors --out model --components-from tiny", "nowhere.safetensors"),
            Case("convert nowhere.gguf --out model --components-from tiny", "nowhere.gguf"),
        ),
        Message(
            "{file}: seems to be empty; download it again",
            "The download or copy was interrupted.",
            Case("convert a.safetensors --out model", "a.safetensors", {"a.safetensors": b""}),
            _convert("a.safetensors", b""),
            _convert("a.gguf", b"", "a.gguf"),
        ),
        Message(
            "{file}: not a {format} file, or damaged ({reason})",
            "The file is incomplete, or of another kind: download it again.",
            _convert("a.safetensors", bytes(200)),
            _convert("a.safetensors", _truncated),
            _convert("a.gguf", b"GGUF", "a.gguf"),
            _convert("a.gguf", b"nothing" * 100, "a.gguf"),
        ),
        Message(
            "{file}: Is a directory",
            "Give the file in it.",
            _convert("a.safetensors", folder),
        ),
        Message(
            "{file}: seems to be {kind}",
            "The tensors' names are those of something else than a transformer.",
            _convert("a VAE", _tensors(dict, VAE)),
            _convert('"strange." before every name', _tensors(_prefixed)),
            _convert("a LoRA adapter", _tensors(lambda tensors: LORA)),
            _convert("a Stable Diffusion 3 transformer", _tensors(lambda tensors: OTHER_FAMILY)),
        ),
        Message(
            "{file}: one missing tensor: {name}",
            "The file is incomplete.",
            _convert("x_pad_token", _tensors(_incomplete)),
        ),
        Message(
            "{file}: {count} missing tensors: {names}",
            "The file is incomplete, or belongs to a larger model than `--components-from`.",
            _convert("missing tensors", _tensors(lambda tensors: {})),
            Case(f"convert {TRANSFORMER} --out model --components-from micro", "missing tensors"),
        ),
    ),
)
