"""Outputs that cannot be written."""

from bad_inputs.files import CACHE, DISTILL, PROMPTS, folder
from bad_inputs.lora_train import LORA
from bad_inputs.table import Case, Message, Section

_RECIPE = {"mine.yaml": DISTILL, "prompts.txt": PROMPTS}
_CACHE = {"cache.yaml": CACHE, "prompts.txt": PROMPTS}
_PROMPTS = {"prompts.txt": PROMPTS}

SECTION = Section(
    "Outputs",
    "Outputs are checked before a model is loaded.",
    (
        Message(
            "{file}: cannot write here (it is a file, not a folder)",
            "A part of the output's path is a file.",
            Case("generate tiny 'a fox' --out prompts.txt/fox.png", "prompts.txt: cannot", _PROMPTS),
            Case("generate tiny 'a fox' --out prompts.txt/", "prompts.txt: cannot", _PROMPTS),
            Case("evaluate tiny --prompts prompts.txt --out prompts.txt", "prompts.txt: cannot", _PROMPTS),
            Case("evaluate tiny --prompts prompts.txt --out old", "old/.images", _PROMPTS | {"old/.images": "mine"}),
            Case("convert tiny --out prompts.txt/model", "prompts.txt: cannot", _PROMPTS),
            Case("convert tiny --out prompts.txt/a.safetensors --to comfyui", "prompts.txt: cannot", _PROMPTS),
            Case("encode-prompts prompts.txt --out prompts.txt --model tiny", "prompts.txt: cannot", _PROMPTS),
            Case("cache-trajectories cache.yaml --out prompts.txt", "prompts.txt: cannot", _CACHE),
            Case("emoji build --out prompts.txt --packages packages", "prompts.txt: cannot", _PROMPTS),
            Case("emoji sheet --out prompts.txt/sheet.png", "prompts.txt: cannot", _PROMPTS),
            Case("emoji gallery --out prompts.txt/a.safetensors", "prompts.txt: cannot", _PROMPTS),
            Case("emoji publish runs/a --out prompts.txt", "prompts.txt: cannot", _PROMPTS),
            Case("lora train lora.yaml --out prompts.txt", "prompts.txt: cannot", _PROMPTS | {"lora.yaml": LORA}),
            Case(
                "lora adapter tiny --out a.safetensors --prompts p --run prompts.txt", "prompts.txt: cannot", _PROMPTS
            ),
            Case("lora choose run --out prompts.txt", "prompts.txt: cannot", _PROMPTS),
            Case("distill mine.yaml --out prompts.txt", "prompts.txt: cannot", _RECIPE),
            Case("distill mine.yaml --out prompts.txt/run", "prompts.txt: cannot", _RECIPE),
            Case("emoji train classifier --out prompts.txt", "prompts.txt: cannot", _PROMPTS),
            Case("prefs collect tiny a=tiny --prompts prompts.txt --out prompts.txt", "prompts.txt: cannot", _PROMPTS),
        ),
        Message(
            "{file}: {ending} is not an image format; use .png, or a folder (its name ends with /)",
            "The ending of the name decides the format.",
            Case("generate tiny 'a fox' --out fox.docx", "fox.docx: .docx"),
            Case("generate tiny --prompts-file prompts.txt --out prompts.txt", "prompts.txt: .txt", _PROMPTS),
            Case("generate tiny 'a fox' --out fox.mp4", "fox.mp4"),
            Case("emoji sheet --out sheet.docx", "sheet.docx: .docx"),
            Case("emoji sheet --out sheet", "a name without an ending"),
        ),
        Message(
            "{file}: is a folder; give the name of a file",
            "There is a folder of this name.",
            Case("emoji sheet --out old.png", "old.png", {"old.png": folder}),
            Case("emoji gallery --out old.safetensors", "old.safetensors", {"old.safetensors": folder}),
        ),
        Message(
            "{file}: the name of the file must end with .safetensors",
            "Weights are written as safetensors only.",
            Case("convert tiny --out model.ckpt --to comfyui", "model.ckpt"),
            Case("convert tiny --out model --to original", "model: the name"),
            Case("emoji gallery --out gallery.pt", "gallery.pt"),
        ),
        Message(
            "{file}: --to diffusers writes a folder; give its name, or --to original for a file",
            "The name of the output is that of a file.",
            Case("convert tiny --out model.safetensors", "model.safetensors"),
            Case("convert tiny --out model.gguf", "model.gguf"),
        ),
        Message(
            "{file}: a picture of {size} pixels cannot be saved as {format} ({reason}); use .png, or a folder",
            "The format has a largest size, and the grid of all images exceeds it.",
            Case(
                "generate tiny --prompts-file many.txt --columns 1 --out grid.webp",
                "grid.webp",
                {"many.txt": "a fox\n" * 300},
            ),
        ),
        Message(
            "--columns: no effect on the folder {folder}, which gets one file an image; leave it out",
            "Only an image file is a grid with columns.",
            Case("generate tiny 'a fox' --columns 2 --out images/", "images/"),
            Case("generate tiny 'a fox' --columns 1 --out old", "old", {"old": folder}),
        ),
        Message(
            "--dtype fp8: fp8 files can be read but not written; use bf16",
            "Take `--dtype bf16`; `models.frozen_dtype: fp8` quantizes while loading.",
            Case("convert tiny --out model --dtype fp8", "use bf16"),
        ),
    ),
)
