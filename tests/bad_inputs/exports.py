"""Models for other programs, for ``fewstep export``."""

from bad_inputs.files import TRANSFORMER
from bad_inputs.table import Case, Message, Section
from bad_inputs.weights import not_finite

_LUMINA = {"other/model_index.json": '{"_class_name": "Lumina2Pipeline"}'}
_HALF_NOISE = {"tiny/fewstep.json": '{"sampler": "sde", "eta": 0.5}'}

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
            "{folder}: its sampler is sde with eta {eta}, which {program} does not have",
            "Other programs draw all noise anew in such a step (eta 1), or none (euler).",
            Case("export tiny --to sd.cpp --out fox", "eta 0.5", _HALF_NOISE),
        ),
        Message(
            "{folder}: already exists; choose another --out",
            "`export` never replaces anything.",
            Case("export tiny --to gguf --out tiny", "tiny: already"),
        ),
        Message(
            "Invalid value for '{option}': Value error, '{value}' is not one of {values}.",
            "Take one of the listed values.",
            Case("export tiny --to onnx --out fox", "'onnx' is not one of 'comfyui', 'gguf', 'sd.cpp'"),
            Case("export tiny --to gguf --quantize q2_k --out fox", "'q2_k'"),
        ),
        Message(
            "{file}: {tensor}: {count} of its {total} numbers are infinite or NaN; the weights are damaged",
            "Nothing is written of such a model.",
            Case("export tiny --to comfyui --out fox", "x_pad_token", {TRANSFORMER: not_finite}),
        ),
    ),
)
