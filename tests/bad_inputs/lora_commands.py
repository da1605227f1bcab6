"""``fewstep lora``: strengths, outputs, and what cannot be done with a LoRA file."""

import torch

from bad_inputs.lora import LAYER, LOKR, LORA_FILE, tensors
from bad_inputs.table import Case, Message, Section

SECTION = Section(
    "LoRA commands",
    "[LoRA](../lora.md) describes the commands.",
    (
        Message(
            "{file}: the strength {text} is no number; write FILE:0.8",
            "A strength follows the last colon.",
            Case("generate tiny 'a fox' --lora a.safetensors:strong", "'strong'", LORA_FILE),
        ),
        Message(
            "{file}: the strength {number} is no finite number",
            "Strengths are mostly between 0.4 and 1.2.",
            Case("generate tiny 'a fox' --lora a.safetensors:inf", "inf", LORA_FILE),
        ),
        Message(
            "{file}: given twice; give it once, with the sum of the strengths",
            "A file has one strength.",
            Case("lora merge tiny a.safetensors a.safetensors:0.5 --out model", "a.safetensors", LORA_FILE),
        ),
        Message(
            "--ignore {key}: no key of {file} matches it",
            "Check the spelling: patterns are matched with the whole key, `*` stands for anything.",
            Case("generate tiny 'a fox' --ignore te.*", "te.*"),
            Case("lora check tiny a.safetensors --ignore te.*", "te.*", LORA_FILE),
            Case("lora merge tiny a.safetensors --ignore te.* --out model", "te.*", LORA_FILE),
            Case(
                "lora mix a.safetensors b.safetensors --ignore te.* --out c.safetensors",
                "te.*",
                {
                    **LORA_FILE,
                    "b.safetensors": tensors({}),
                },
            ),
            Case("lora info a.safetensors --ignore te.*", "te.*", LORA_FILE),
            Case("lora resize a.safetensors --rank 2 --ignore te.* --out b.safetensors", "te.*", LORA_FILE),
            Case("lora convert a.safetensors --to kohya --ignore te.* --out b.safetensors", "te.*", LORA_FILE),
        ),
        Message(
            "{file}: changes nothing: the images with and without it are identical",
            "The LoRA was not trained, or its strength is too small.",
            Case("lora check tiny a.safetensors:0 --prompt fox", "a.safetensors", LORA_FILE),
        ),
        Message(
            "{file}: already exists; choose another --out",
            "Nothing is overwritten.",
            Case("lora convert a.safetensors --to kohya --out a.safetensors", "a.safetensors", LORA_FILE),
            Case("lora resize a.safetensors --rank 2 --out a.safetensors", "a.safetensors", LORA_FILE),
            Case("lora extract tiny tiny --out tiny", "tiny"),
        ),
        Message(
            "{file}: the name of the file must end with .safetensors",
            "Only safetensors are written.",
            Case("lora convert a.safetensors --to kohya --out b.pt", "b.pt", LORA_FILE),
            Case("lora adapter tiny --out b.pt --prompts prompts.txt", "b.pt"),
            Case("lora mix a.safetensors b.safetensors --out c", "c", LORA_FILE),
        ),
        Message(
            "{file}: --to peft writes a folder; give its name",
            "peft opens folders.",
            Case("lora convert a.safetensors --to peft --out b.safetensors", "b.safetensors", LORA_FILE),
        ),
        Message(
            "{file}: .docx is not an image format; use .png, or a folder (its name ends with /)",
            "`lora check` writes one picture.",
            Case("lora check tiny a.safetensors --out a.docx", "a.docx", LORA_FILE),
        ),
        Message(
            "{folder}: holds other files than a model, and saving would delete them; use another folder",
            "A merged model needs a folder of its own.",
            Case("lora merge tiny a.safetensors --out mine", "mine", {**LORA_FILE, "mine/notes.txt": "notes"}),
        ),
        Message(
            "{module}: LoKr of a fused layer has no exact form with the names of {layout}; write comfyui, or turn it "
            "into LoRA: fewstep lora resize",
            "A Kronecker product of three layers is none of each.",
            Case(
                "lora convert a.safetensors --to diffusers --out b.safetensors",
                "LoKr",
                {
                    "a.safetensors": tensors(LOKR, {}),
                },
            ),
        ),
        Message(
            "{file}: {layer} is LoKr; turn it into LoRA first: fewstep lora resize",
            "LoKr has no low rank that could be concatenated.",
            Case(
                "lora mix a.safetensors b.safetensors --out c.safetensors",
                "LoKr",
                {
                    **LORA_FILE,
                    "b.safetensors": tensors(LOKR, {}),
                },
            ),
        ),
        Message(
            "{file}: {layer} has DoRA, whose effects do not add up; merge it into the model",
            "DoRA normalizes the changed weight.",
            Case(
                "lora mix a.safetensors b.safetensors --out c.safetensors",
                "DoRA",
                {
                    **LORA_FILE,
                    "b.safetensors": tensors({f"{LAYER}.dora_scale": torch.ones(48, 1)}),
                },
            ),
        ),
        Message(
            "mix: give two LoRA files or more",
            "To change one, use `fewstep lora resize`.",
            Case("lora mix a.safetensors --out c.safetensors", "mix", LORA_FILE),
        ),
        Message(
            "{model}: no linear layer differs from {model}: there is nothing to extract",
            "The models have the same weights.",
            Case("lora extract tiny tiny --out a.safetensors", "tiny"),
        ),
        Message(
            "{model}: another architecture than {model}: {count} different tensors: {names}",
            "A LoRA is extracted from two models of one architecture.",
            Case("lora extract tiny micro --out a.safetensors", "micro"),
        ),
        Message(
            "{folder}: no such folder; did you mean the bundled model {name}?",
            "Check the spelling.",
            Case("lora resize a.safetensors --rank 2 --out b.safetensors --model mico", "mico", LORA_FILE),
            Case("lora mix a.safetensors b.safetensors --out c.safetensors --model mico", "mico", LORA_FILE),
            Case("lora convert a.safetensors --to kohya --out b.safetensors --model mico", "mico", LORA_FILE),
        ),
        Message(
            "Invalid value for '{option}': {value} is not one of {choices}.",
            "Take one of the list. The exit code of these is 2.",
            Case("lora convert a.safetensors --to onnx --out b.safetensors", "onnx"),
            Case("lora convert a.safetensors --to kohya --out b.safetensors --dtype fp8", "fp8"),
            Case("lora resize a.safetensors --rank 2 --out b.safetensors --dtype int8", "int8"),
            Case("lora mix a.safetensors b.safetensors --out c.safetensors --dtype fp8", "fp8"),
            Case("lora extract tiny micro --out a.safetensors --dtype fp8", "fp8"),
        ),
        Message(
            "Invalid value for '{option}': Input should be {bound}",
            "Take a number in the range. The exit code of these is 2.",
            Case("lora resize a.safetensors --rank 0 --out b.safetensors", "--rank"),
            Case("lora mix a.safetensors b.safetensors --rank 0 --out c.safetensors", "--rank"),
            Case("lora resize a.safetensors --rank 2 --energy 2 --out b.safetensors", "--energy"),
            Case("lora extract tiny micro --energy 95 --out a.safetensors", "--energy"),
            Case("lora extract tiny micro --rank 0 --out a.safetensors", "--rank"),
        ),
        Message(
            "device {device}: {reason}",
            "Take `auto`, `cpu` or a GPU that is there.",
            Case("lora check tiny a.safetensors --device cuda:7", "cuda:7", LORA_FILE),
            Case("lora extract tiny micro --out a.safetensors --device cuda:7", "cuda:7"),
            Case("lora resize a.safetensors --rank 2 --out b.safetensors --device cuda:7", "cuda:7", LORA_FILE),
        ),
    ),
)
