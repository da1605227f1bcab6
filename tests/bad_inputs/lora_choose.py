"""``fewstep lora choose``: folders without anything to compare."""

from bad_inputs.lora_train import LORA, SET
from bad_inputs.table import Case, Content, Message, Section

_RUN: dict[str, Content] = {"run/recipe.yaml": LORA, "run/lora/mine-00000002.safetensors": b"", **SET}
_NO_FILES: dict[str, Content] = {"run/recipe.yaml": LORA, **SET}
_OWN: dict[str, Content] = {"run/recipe.yaml": LORA.replace("data: {images: set}", "data: {own_images: {count: 2}}")}

SECTION = Section(
    "Choosing a checkpoint",
    "[LoRA](../lora.md#choosing-a-checkpoint) describes `fewstep lora choose`.",
    (
        Message(
            "{folder}: no run of fewstep lora train (no recipe.yaml)",
            "Give the run directory, not its folder `lora`.",
            Case("lora choose nowhere", "nowhere"),
        ),
        Message(
            "{folder}: trained on the model's own images; there is no training set to compare with",
            "A training adapter has no images that it should resemble.",
            Case("lora choose run", "run", _OWN),
        ),
        Message(
            "{folder}: no checkpoint in {folder} yet; train.save_every and keep_files make some",
            "A file is written with every checkpoint.",
            Case("lora choose run", "run/lora", _NO_FILES),
        ),
        Message(
            "{set}: one image; distances among training images need at least 2",
            "Memorization is relative to them.",
            Case("lora choose run", "set", _RUN),
        ),
    ),
)
