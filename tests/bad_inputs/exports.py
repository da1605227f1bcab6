"""Models for other programs, for ``fewstep export``."""

import json
import zipfile
from pathlib import Path

from bad_inputs.files import DISTILL, PROMPTS, TRANSFORMER, folder, json_with
from bad_inputs.table import Case, Message, Section
from bad_inputs.weights import not_finite

_LUMINA = {"other/model_index.json": '{"_class_name": "Lumina2Pipeline"}'}
_PROMPTS = {"prompts.txt": PROMPTS}
_STEPS = {"tiny/step_loras": folder, "tiny/fewstep.json": json_with(steps=1, sigmas=[1, 0], step_loras=True)}
_HALF_NOISE = {"tiny/fewstep.json": '{"sampler": "sde", "eta": 0.5}'}


def _other_package(path: Path) -> None:
    """A package of another version of torch and another model."""
    content = {"batch": 1, "shape": [16, 8, 8], "architecture": "none"}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data/aotinductor/model/a_metadata.json", json.dumps({"fewstep": json.dumps(content)}))


SECTION = Section(
    "Exports",
    "[Export](../guides/export.md) has the programs and their formats.",
    (
        Message(
            "--quantize {format}: --to {program} takes {formats}, or nothing for bf16",
            "ComfyUI's own nodes read fp8, GGUF files hold q8_0 and q4_k.",
            Case("export tiny --to comfyui --quantize q4_k --out fox", "--to comfyui takes fp8"),
            Case("export tiny --to sd.cpp --quantize fp8 --out fox", "--to sd.cpp takes q8_0, q4_k"),
        ),
        Message(
            "{folder}: the names of {pipeline} in other programs are not known; use Z-Image",
            "Only Z-Image can be exported.",
            Case("export other --to gguf --out fox", "Lumina2Pipeline", _LUMINA),
        ),
        Message(
            "{command}: {folder} is a student with a LoRA for each step, which one transformer cannot hold; it can be "
            "sampled, served and evaluated, and init can start a recipe with models.lora_per_step from it",
            "Train with `models.lora_per_step: false` for one transformer.",
            Case("export tiny --to comfyui --out fox", "comfyui: tiny is a student with a LoRA for each", _STEPS),
            Case("export tiny --aot --out fox.pt2", "--aot: tiny is a student", _STEPS),
            Case("convert tiny --to original --out fox.safetensors", "--to original: tiny is a student", _STEPS),
            Case("lora merge tiny x.safetensors --out fox", "merge: tiny is a student", _STEPS),
            Case("lora extract tiny tiny --out x.safetensors", "extract: tiny is a student", _STEPS),
            Case("distill mine.yaml", "teacher: tiny is a student", _STEPS | {"mine.yaml": DISTILL, **_PROMPTS}),
            Case("lora train micro-lora -s model=tiny", "model: tiny is a student", _STEPS),
        ),
        Message(
            "{folder}: its sampler is sde with eta {eta}, which {program} does not have",
            "Other programs draw all noise anew in such a step (eta 1), or none (euler).",
            Case("export tiny --to sd.cpp --out fox", "eta 0.5", _HALF_NOISE),
        ),
        Message(
            "{folder}: already exists; choose another --out",
            "`export` never replaces anything.",
            Case("export tiny --to gguf --out tiny", "tiny: already"),
            Case("export tiny --aot --out old.pt2", "old.pt2: already", {"old.pt2": "mine"}),
        ),
        Message(
            "Invalid value for '{option}': Value error, '{value}' is not one of {values}.",
            "Take one of the listed values.",
            Case("export tiny --to onnx --out fox", "'onnx' is not one of 'comfyui', 'gguf', 'sd.cpp'"),
            Case("export tiny --to gguf --quantize q2_k --out fox", "'q2_k'"),
            Case("export tiny --aot --dtype int8 --out fox.pt2", "'int8'"),
        ),
        Message(
            "export: give one of --to and --aot",
            "Files for other programs, or a compiled transformer.",
            Case("export tiny --out fox", "--to"),
            Case("export tiny --to gguf --aot --out fox", "--aot"),
        ),
        Message(
            "{option}: no effect with{...} --aot; leave it out",
            "The option belongs to the other kind of export.",
            Case("export tiny --aot --quantize fp8 --out fox.pt2", "--quantize: no effect with --aot"),
            Case("export tiny --to gguf --size 64 --out fox", "--size: no effect without --aot"),
            Case("export tiny --to gguf --batch 2 --out fox", "--batch"),
            Case("export tiny --to gguf --dtype bf16 --out fox", "--dtype"),
            Case("export tiny --to gguf --device cpu --out fox", "--device"),
        ),
        Message(
            "device {name}: not a device; use auto, cpu, cuda, cuda:1, ...",
            "A package is compiled for the device that it is used on.",
            Case("export tiny --aot --device gpu --out fox.pt2", "device gpu"),
        ),
        Message(
            "Invalid value for '{option}': Input should be {bound}",
            "Take a number in the range.",
            Case("export tiny --aot --size 0 --out fox.pt2", "--size"),
            Case("export tiny --aot --batch 0 --out fox.pt2", "--batch"),
        ),
        Message(
            "{file}: the name of the file must end with .pt2",
            "AOTInductor's packages have this name.",
            Case("export tiny --aot --out fox", "fox: the name"),
        ),
        Message(
            "--dtype fp8: cannot be compiled ahead of time; use bf16",
            "Packages compute in fp32 or bf16.",
            Case("export tiny --aot --dtype fp8 --out fox.pt2", "fp8"),
        ),
        Message(
            "{side} {pixels} is not a multiple of {number}",
            "A patch of the latent covers so many pixels.",
            Case("export tiny --aot --size 40 --out fox.pt2", "height 40"),
        ),
        Message(
            "{file}: no such file",
            "Check the path.",
            Case("generate tiny fox --aot fox.pt2", "fox.pt2"),
        ),
        Message(
            "{file}: not a package of fewstep export --aot, or damaged ({reason})",
            "Other programs' packages are not taken.",
            Case("generate tiny fox --aot fox.pt2", "fox.pt2", {"fox.pt2": b"none"}),
        ),
        Message(
            "{file}: was made for another {...}; export it again: fewstep export MODEL --aot",
            "A package is for one architecture, dtype, device and version of torch.",
            Case("generate tiny fox --aot fox.pt2", "architecture", {"fox.pt2": _other_package}),
        ),
        Message(
            "aot: a package needs all weights in place; use offload none or model",
            "Offloaded blocks have no weights until they compute.",
            Case("generate tiny fox --aot fox.pt2 --offload group", "offload", {"fox.pt2": _other_package}),
        ),
        Message(
            "{file}: {tensor}: {count} of its {total} numbers are infinite or NaN; the weights are damaged",
            "Nothing is written of such a model.",
            Case("export tiny --to comfyui --out fox", "x_pad_token", {TRANSFORMER: not_finite}),
        ),
    ),
)
