"""Comparisons that cannot be made, and files of votes that cannot be used."""

import json
from typing import Any

import torch
from safetensors.torch import save_file

from bad_inputs.files import PROMPTS
from bad_inputs.table import Case, Message, Section

_PROMPTS = {"prompts.txt": PROMPTS}
_TO = "--prompts prompts.txt --out votes"
_COLLECT = f"prefs collect tiny tiny@steps=1 {_TO}"


def _votes(*records: dict[str, Any], end: str = "") -> dict[str, str]:
    return {"votes/votes.jsonl": "".join(json.dumps(record) + "\n" for record in records) + end}


def _vote(number: int, left: str = "a", right: str = "b", choice: str = "left", **more: Any) -> dict[str, Any]:
    sides = {"left": {"model": left, "image": "l.png"}, "right": {"model": right, "image": "r.png"}}
    return {"vote": number, "prompt": f"prompt {number}", **sides, "choice": choice, **more}


_TWO = _votes(_vote(1), _vote(2))
MANY_VOTES = _votes(*(_vote(number) for number in range(1, 13)))
_HEAD = {"head/preference.json": "{}", "head/preference.safetensors": b""}

SECTION = Section(
    "Preferences",
    "The votes of `fewstep prefs collect` are in `votes.jsonl` in its folder, one a line.",
    (
        Message(
            "a comparison needs at least 2 models, got {count}; one model can be given twice with other settings, as "
            "in micro micro@steps=4",
            "Name another model, or the same one with other settings.",
            Case(f"prefs collect tiny {_TO}", "got 1", _PROMPTS),
        ),
        Message(
            "{model}: another model has the label {label}; give it one, as in LABEL={model}",
            "Votes and ratings name models by their labels.",
            Case(f"prefs collect tiny tiny {_TO}", "the label tiny", _PROMPTS),
            Case(f"prefs collect a=tiny A=tiny@steps=1 {_TO}", "the label A", _PROMPTS),
        ),
        Message(
            "{model}: '{setting}' is no setting; write KEY=VALUE, as in micro@steps=4,guidance_scale=0",
            "Settings are separated by commas.",
            Case(f"prefs collect tiny tiny@steps=1,fast {_TO}", "'fast' is no setting", _PROMPTS),
        ),
        Message(
            "{model}: {key} cannot differ between models; it may be one of {keys}",
            "Only what changes an image is a setting here.",
            Case(f"prefs collect tiny tiny@batch_size=3 {_TO}", "batch_size cannot differ", _PROMPTS),
        ),
        Message(
            "{model}: unknown key {key}; did you mean {other}?",
            "Settings are the sampling parameters of `fewstep.generate`.",
            Case(f"prefs collect tiny tiny@step=3 {_TO}", "did you mean steps?", _PROMPTS),
        ),
        Message(
            "{model}: {label} cannot be the name of a folder; give a label, as in NAME={model}",
            "The label is the name of the folder of the model's images.",
            Case(f"prefs collect tiny 'tiny@system_prompt=a fox' {_TO}", "cannot be the name of a folder", _PROMPTS),
        ),
        Message(
            "unknown voter '{name}'; known: {names}",
            "A reward or scorer votes by its name; `human` is the page.",
            Case(f"{_COLLECT} --voter guess", "'guess'; known: human, reward:", _PROMPTS),
            Case(f"{_COLLECT} --voter reward:nearest_real", "'reward:nearest_real'", _PROMPTS),
        ),
        Message(
            "--voter {voter}: a name is missing; write human, or human:NAME",
            "Name the person whose votes these are.",
            Case(f"{_COLLECT} --voter human:", "--voter human:", _PROMPTS),
        ),
        Message(
            "{file}: no such file; votes come from fewstep prefs collect",
            "Check the path: it is that of the folder with `votes.jsonl`.",
            Case("prefs rank nowhere", "nowhere/votes.jsonl"),
            Case("prefs train nowhere --out head", "nowhere/votes.jsonl"),
        ),
        Message(
            "{file}: no votes {...}",
            "Collect votes first, or name a voter that there is.",
            Case("prefs rank votes", "no votes in it", _votes()),
            Case("prefs rank votes --voter me", "no votes of me; there are votes of: human", _TWO),
            Case("prefs train votes --out head --voter me", "no votes of me", _TWO),
            Case(
                "prefs rank votes",
                "no votes connect these groups of models: a, b | c, d",
                _votes(_vote(1), _vote(2, "c", "d")),
            ),
        ),
        Message(
            "{file}, line {number}: {problem}; delete {...}",
            "The line was changed by hand, or the file was damaged.",
            Case("prefs rank votes", "line 2: not JSON", _votes(_vote(1), end="{oops}\n")),
            Case("prefs rank votes", "line 1: expected an object with the key vote or undo", _votes(end="[1]\n")),
            Case("prefs train votes --out head", "line 2: a second vote 1", _votes(_vote(1), _vote(1))),
        ),
        Message(
            "{file}, line {number}: {problem}; correct it, or delete the line",
            "The line was changed by hand, or written by another program.",
            Case("prefs rank votes", "line 1: choice: input should be 'left'", _votes(_vote(1, choice="both"))),
            Case(f"{_COLLECT} --voter human", "line 1: unknown key by", _PROMPTS | _votes(_vote(1, by="me"))),
        ),
        Message(
            "{file}, line {number}: undo {vote}: no vote before it has this number",
            "Records are undone once, and after they were made.",
            Case("prefs rank votes", "line 2: undo 5", _votes(_vote(1), {"undo": 5})),
        ),
        Message(
            "{file}: votes on {count} models and {number} prompts; a ranking needs at least 2 of both",
            "Intervals come from the differences between prompts.",
            Case("prefs rank votes", "2 models and 1 prompts", _votes(_vote(1))),
        ),
        Message(
            "{file}: votes on {count} prompts; a head needs votes on at least {number}",
            "Collect votes on more prompts.",
            Case("prefs train votes --out head", "on 2 prompts", _TWO),
        ),
        Message(
            "{file}: the votes on the {part} prompts are all ties; collect more votes",
            "Ties alone show no preference.",
            Case(
                "prefs train votes --out head",
                "held-out",
                _votes(*(_vote(number, choice="tie") for number in range(1, 13))),
            ),
        ),
        Message(
            "{file}: cannot be read ({reason})",
            "The file is missing or damaged; images are in the folder of the votes.",
            Case("prefs train votes --out head", "votes/l.png", MANY_VOTES),
        ),
        Message(
            "{folder}: holds a head already; use another --out, or --overwrite",
            "An earlier head is kept.",
            Case("prefs train votes --out head", "head: holds a head", MANY_VOTES | _HEAD),
        ),
        Message(
            "{folder}: holds other files, such as {file}; use another --out",
            "The folder of a head holds nothing else.",
            Case("prefs train votes --out head --overwrite", "such as mine.txt", MANY_VOTES | {"head/mine.txt": "a"}),
        ),
        Message(
            "features {name}: this reward has no embeddings; take clip:PATH_OR_HUB_ID or open-nsfw",
            "A head needs the embeddings of image and prompt.",
            Case(
                "prefs train votes --out new --features reward:preference:head",
                "no embeddings",
                MANY_VOTES
                | {
                    "head/preference.json": '{"format": 1, "features": "open-nsfw"}',
                    "head/preference.safetensors": lambda path: save_file(
                        {name: torch.ones(3) for name in ("weight", "center", "scale")}, path
                    ),
                },
            ),
        ),
        Message(
            "{file} is missing; fewstep prefs train writes a head",
            "The reward `preference:FOLDER` takes the folder of a head.",
            Case(f"{_COLLECT} --voter preference:head", "head/preference.safetensors is missing", _PROMPTS),
        ),
    ),
)
