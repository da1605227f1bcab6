"""LoRA files, for ``fewstep lora`` and ``fewstep generate --lora``."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from bad_inputs.files import TRANSFORMER, folder
from bad_inputs.table import Case, Content, Message, Section

LAYER = "transformer.layers.0.attention.to_q"
GOOD = {f"{LAYER}.lora_A.weight": torch.ones(2, 48), f"{LAYER}.lora_B.weight": torch.ones(48, 2)}


def tensors(more: dict[str, Tensor], base: dict[str, Tensor] = GOOD) -> Content:
    """A file with these tensors."""
    return lambda path: save_file({key: tensor.clone() for key, tensor in (base | more).items()}, path)


def peft(config: str | None) -> Callable[[Path], None]:
    """A folder that peft could have written."""

    def write(path: Path) -> None:
        path.mkdir()
        save_file({key.replace("transformer", "base_model.model"): one for key, one in GOOD.items()}, path / _PEFT)
        if config is not None:
            (path / "adapter_config.json").write_text(config)

    return write


_PEFT = "adapter_model.safetensors"
LORA_FILE = {"a.safetensors": tensors({})}


def _generate(expected: str, content: Content) -> Case:
    return Case("generate tiny 'a fox' --lora a.safetensors", expected, {"a.safetensors": content})


def _two_folders(path: Path) -> None:
    path.mkdir()
    for name in ("one", "two"):
        save_file(GOOD, path / f"{name}.safetensors")


_FLUX = {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.ones(2, 8)} | {
    "lora_unet_single_blocks_0_linear1.lora_down.weight": torch.ones(2, 8)
}
_QKV = "diffusion_model.layers.0.attention.qkv"
LOKR = {f"{_QKV}.lokr_w1": torch.ones(4, 4), f"{_QKV}.lokr_w2": torch.ones(36, 12)}
_WEIRD = {"weird": torch.ones(2)}
_NAN = {f"{LAYER}.lora_A.weight": torch.full((2, 48), float("nan"))}

SECTION = Section(
    "LoRA files",
    "[LoRA](../lora.md) has the formats that are read and written.",
    (
        Message(
            "{file}: no such file",
            "Check the path.",
            Case("lora info nowhere.safetensors", "nowhere.safetensors"),
            Case("generate tiny 'a fox' --lora nowhere.safetensors:0.8", "nowhere.safetensors"),
        ),
        Message(
            "{file}: empty; download it again",
            "The download or copy was interrupted.",
            _generate("a.safetensors", b""),
        ),
        Message(
            "{file}: holds no tensors; there is no LoRA to load",
            "The training that wrote it was interrupted.",
            _generate("a.safetensors", tensors({}, {})),
        ),
        Message(
            "{file}: all of its keys are ignored; there is no LoRA to load",
            "Leave `--ignore` out, or narrow its pattern.",
            Case("lora check tiny a.safetensors --ignore *", "a.safetensors", LORA_FILE),
        ),
        Message(
            "{file}: not a safetensors file, or damaged ({reason})",
            "Download or copy it again.",
            Case("lora info a.safetensors", "a.safetensors", {"a.safetensors": bytes(200)}),
        ),
        Message(
            "{file}: a pickled checkpoint, which could run code; save it as safetensors",
            "Convert it with a program that you trust.",
            Case("lora info a.pt", "a.pt", {"a.pt": b"\x80\x04" + bytes(200)}),
        ),
        Message(
            "{file}: no LoRA: it seems to be {kind}",
            "The file is a model or a component.",
            Case(f"lora check tiny {TRANSFORMER}", "a Z-Image or Lumina transformer"),
        ),
        Message(
            "{file}: no LoRA: it has {key}",
            "None of its keys is that of an adapter.",
            _generate("weird", tensors(_WEIRD, {})),
            Case(
                "serve tiny --lora-dir loras", "weird", {"loras/a.safetensors": tensors({"weird": torch.ones(2)}, {})}
            ),
        ),
        Message(
            "{folder}: no LoRA in this folder ({file} or {file} is found by itself)",
            "Name the file.",
            Case("lora info empty", "empty: no LoRA", {"empty": folder}),
        ),
        Message(
            "{folder}: {count} LoRA files; name one of them ({file} or {file} is found by itself)",
            "Name the file.",
            Case("lora info both", "both: 2 LoRA files", {"both": _two_folders}),
        ),
        Message(
            "{file}: no configuration of an adapter can be read ({reason})",
            "The folder of peft is damaged.",
            Case("lora info one", "adapter_config.json", {"one": peft("{}")}),
            Case("lora convert one --to kohya --out b.safetensors", "adapter_config.json", {"one": peft("no")}),
        ),
        Message(
            "{file}: {key} bind no layer of the model; --ignore KEY leaves a key out",
            "The file is for another model, or has a layer that this one lacks.",
            _generate("layers.7", tensors({"transformer.layers.7.attention.to_q.lora_A.weight": torch.ones(2, 48)})),
            Case(
                "lora info a.safetensors --model tiny",
                "layers.7",
                {"a.safetensors": tensors({"transformer.layers.7.attention.to_q.lora_A.weight": torch.ones(2, 48)})},
            ),
        ),
        Message(
            "{file}: {key} bind no layer of the model (it seems to be a LoRA for {family}); --ignore KEY leaves a key "
            "out",
            "Use a LoRA for this model.",
            _generate("a FLUX or HunyuanVideo transformer", tensors(_FLUX, {})),
        ),
        Message(
            "{file}: {module} changes a matrix of {size}, but {layer} has one of {size}: a LoRA for another model",
            "Use a LoRA for this model.",
            Case("lora info a.safetensors --model micro", "48 x 48", LORA_FILE),
            Case("lora merge micro a.safetensors --out model", "192 x 192", LORA_FILE),
        ),
        Message(
            "{file}: {key} is a text encoder's; only the transformer is adapted; --ignore KEY leaves a key out",
            "Z-Image's text encoder is not adapted here.",
            _generate("lora_te1_a", tensors({"lora_te1_a.lora_down.weight": torch.ones(2, 8)})),
        ),
        Message(
            "{file}: {key} is {kind}; --ignore KEY leaves a key out",
            "Not supported: LoHa, OFT, GLoRA, full differences, biases, convolutions.",
            _generate("LoHa", tensors({f"{LAYER}.hada_w1_a": torch.ones(2, 2)})),
            _generate("a convolution's", tensors({f"{LAYER}.lora_mid.weight": torch.ones(2, 2, 3, 3)})),
            _generate("a full difference", tensors({f"{LAYER}.diff": torch.ones(48, 48)})),
            _generate("a bias", tensors({f"{LAYER}.lora_B.bias": torch.ones(48)})),
        ),
        Message(
            "{file}: {key} is {kind} ({count} more keys are not supported); --ignore KEY leaves a key out",
            "As above; a pattern such as `--ignore 'text_encoder.*'` leaves out several.",
            _generate("LoHa (1 more", tensors({f"{LAYER}.hada_w{n}_a": torch.ones(2, 2) for n in (1, 2)})),
        ),
        Message(
            "{file}: {key} is a convolution's {shape}; the model has linear layers alone",
            "Use a LoRA for this model.",
            _generate("[2, 8, 3, 3]", tensors({f"{LAYER}.lora_A.weight": torch.ones(2, 8, 3, 3)})),
        ),
        Message(
            "{file}: {key}: no known part of an adapter; --ignore KEY leaves a key out",
            "Please report the program that wrote it.",
            _generate("to_q.strange", tensors({f"{LAYER}.strange": torch.ones(2, 2)})),
        ),
        Message(
            "{file}: {module} has no {part}; the file is incomplete",
            "Download or convert it again.",
            _generate("lora_B", tensors({}, {f"{LAYER}.lora_A.weight": torch.ones(2, 48)})),
        ),
        Message(
            "{file}: {module} has no {part}, or not both of its factors; the file is incomplete",
            "Download or convert it again.",
            _generate("lokr_w2", tensors({}, {f"{LAYER}.lokr_w1": torch.ones(2, 48)})),
        ),
        Message(
            "{file}: {key} is {shape}, which does not fit a rank of {rank}",
            "Its two matrices are of different adapters.",
            _generate("rank of 3", tensors({f"{LAYER}.lora_A.weight": torch.ones(3, 48)})),
        ),
        Message(
            "{file}: {key} is {shape}; expected a matrix",
            "The file is damaged.",
            _generate("expected a matrix", tensors({f"{LAYER}.lora_A.weight": torch.ones(48)})),
        ),
        Message(
            "{file}: {key} has {count} values; an alpha is one number",
            "The file is damaged.",
            _generate("alpha", tensors({f"{LAYER}.alpha": torch.ones(2)})),
        ),
        Message(
            "{file}: {key} is {shape}; expected a norm for each row or column",
            "The DoRA scale is of another layer.",
            _generate("dora_scale", tensors({f"{LAYER}.dora_scale": torch.ones(5, 1)})),
        ),
        Message(
            "{file}: {key} is quantized ({dtype}); use the LoRA in bf16, fp16 or fp32",
            "Quantized LoRA files are not read.",
            _generate("torch.int8", tensors({f"{LAYER}.lora_A.weight": torch.ones(2, 48, dtype=torch.int8)})),
        ),
        Message(
            "{file}: {key} has values that are not finite; the training diverged, use another checkpoint",
            "The LoRA would make black images.",
            _generate("not finite", tensors(_NAN)),
        ),
        Message(
            "{file}: {key} and {key} are the same part of one layer; --ignore one of them",
            "The file has a layer twice.",
            _generate("lora_down", tensors({f"{LAYER}.lora_down.weight": torch.ones(2, 48)})),
        ),
        Message(
            "{file}: {module} and {module} are both the layer {layer}; --ignore '{module}.*' leaves one out",
            "The file has a layer under two names.",
            _generate(
                "both the layer",
                tensors({key.replace("transformer.", "diffusion_model."): one for key, one in GOOD.items()}),
            ),
        ),
    ),
)
