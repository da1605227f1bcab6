"""``fewstep steps train`` and ``fewstep generate --steps auto``."""

from bad_inputs.files import PROMPTS
from bad_inputs.table import Case, Message, Section

_PROMPTS = {"prompts.txt": PROMPTS}
_TRAIN = "steps train tiny --prompts prompts.txt --reward ocr"

SECTION = Section(
    "Steps for each prompt",
    "`fewstep steps train` writes `steps.safetensors` into a model's folder, for `fewstep generate --steps auto`.",
    (
        Message(
            "steps auto: {folder} has no steps.safetensors; make it with fewstep steps train",
            "The model has no step chooser yet.",
            Case("generate tiny 'a fox' --steps auto", "steps auto"),
        ),
        Message(
            "{file}: cannot be read ({reason}); make it again with fewstep steps train",
            "The file is damaged, or of another version.",
            Case("generate tiny 'a fox' --steps auto", "steps.safetensors", {"tiny/steps.safetensors": b"none"}),
        ),
        Message(
            "{file}: exists; give --overwrite to make it again",
            "The model has a step chooser already.",
            Case(_TRAIN, "steps.safetensors", _PROMPTS | {"tiny/steps.safetensors": b"none"}),
        ),
        Message(
            "{model}: a bundled model; copy its folder ({folder}) and give the copy",
            "Nothing is written into the package.",
            Case("steps train micro --prompts prompts.txt --reward ocr", "micro: a bundled model", _PROMPTS),
        ),
        Message(
            "--counts {counts}: give at least two ascending numbers of steps, such as 1,2,4,8",
            "Numbers of steps are in ascending order, with commas.",
            Case(f"{_TRAIN} --counts 8,4", "--counts 8,4", _PROMPTS),
            Case(f"{_TRAIN} --counts 4", "--counts 4", _PROMPTS),
            Case(f"{_TRAIN} --counts few", "--counts few", _PROMPTS),
        ),
        Message(
            "--mean-steps {number}: give a number between {least} and {most}, those of --counts",
            "A mean lies between the least and the most.",
            Case(f"{_TRAIN} --mean-steps 8", "--mean-steps 8: give a number between 1 and 8", _PROMPTS),
            Case(f"{_TRAIN} --counts 2,4 --mean-steps 1", "--mean-steps 1: give a number between 2 and 4", _PROMPTS),
            Case(f"{_TRAIN} --mean-steps nan", "--mean-steps nan", _PROMPTS),
        ),
        Message(
            "--num-prompts: {source} has {number} prompts, fewer than {wanted}",
            "Give more prompts, or ask for fewer: at least 40.",
            Case(_TRAIN, "--num-prompts", _PROMPTS),
        ),
    ),
)
