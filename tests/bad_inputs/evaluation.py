"""Scorers, feature networks and packages."""

from bad_inputs.files import DISTILL, PROMPTS
from bad_inputs.lora_train import LORA_RUN
from bad_inputs.preferences import MANY_VOTES
from bad_inputs.table import Case, Message, Section

_PROMPTS = {"prompts.txt": PROMPTS}
_MEASURED = DISTILL.replace("{enabled: false}", "{enabled: true}").replace(
    "{source: prompts.txt}", "{source: prompts.txt, test_source: test.txt}"
)
_RECIPE = {"mine.yaml": _MEASURED, "prompts.txt": PROMPTS, "test.txt": "a cow\na dog\n"}
EVALUATE = "evaluate tiny --prompts prompts.txt"

SECTION = Section(
    "Evaluation",
    "A recipe's evaluation is checked before the training.",
    (
        Message(
            "unknown scorer '{name}'; known: {names}",
            "Check the spelling. A scorer of your own is registered by a module in `FEWSTEP_PLUGINS`.",
            Case(f"{EVALUATE} --scorer guess", "'guess'", _PROMPTS),
            Case("lora choose run --scorer guess", "'guess'", LORA_RUN),
            Case("distill mine.yaml -s 'evaluate.scorers=[guess]'", "'guess'", _RECIPE),
        ),
        Message(
            "--compare {given}: write LABEL=MODEL",
            "The label heads the model's column in the report.",
            Case(f"{EVALUATE} --compare tiny", "--compare tiny", _PROMPTS),
        ),
        Message(
            "{given}: the label '{label}' must be of letters, digits, - and ., and none of {names}",
            "Give the model another label.",
            Case(f"{EVALUATE} --compare real=tiny", "the label 'real'", _PROMPTS),
            Case(f"{EVALUATE} --compare a_b=tiny", "the label 'a_b'", _PROMPTS),
            Case("distill mine.yaml -s evaluate.compare.student=tiny", "evaluate.compare.student", _RECIPE),
        ),
        Message(
            "--compare {given}: another model has the label {label}",
            "Give each model a label of its own.",
            Case(f"{EVALUATE} --compare a=tiny --compare a=micro", "the label a", _PROMPTS),
        ),
        Message(
            "unknown feature network '{name}'; known: {names}",
            "Check the spelling.",
            Case(f"{EVALUATE} --features guess", "'guess'", _PROMPTS),
            Case("lora choose run --features guess", "'guess'", LORA_RUN),
            Case("distill mine.yaml -s evaluate.features=guess", "'guess'", _RECIPE),
            Case("prefs train votes --out head --features guess", "'guess'", MANY_VOTES),
        ),
        Message(
            "{kind} {name}: give a checkpoint, as in {name}:PATH_OR_HUB_ID",
            "Its weights are not bundled: name a folder or a hub id after a colon.",
            Case(f"{EVALUATE} --scorer clip_score", "scorer clip_score", _PROMPTS),
            Case(f"{EVALUATE} --features clip", "feature network clip", _PROMPTS),
            Case("distill mine.yaml -s evaluate.features=dinov2", "feature network dinov2", _RECIPE),
        ),
        Message(
            "reward {name}: give {what}, as in {name}:{form}",
            "What follows the colon is in the guide on rewards.",
            Case(f"{EVALUATE} --scorers hpsv2", "reward hpsv2: give a checkpoint", _PROMPTS),
            Case(f"{EVALUATE} --scorers background,judge", "reward judge: give the endpoint", _PROMPTS),
            Case("distill mine.yaml -s 'evaluate.scorers=[python]'", "as in python:MODULE:FUNCTION", _RECIPE),
        ),
        Message(
            "reward python:{callable}: {module} cannot be imported: {reason}",
            "The module must be installed, or be a file in the working directory.",
            Case(f"{EVALUATE} --scorers python:no_such_module:f", "no_such_module cannot be imported", _PROMPTS),
        ),
        Message(
            "reward python:{callable}: {module} has no callable {name}",
            "Check the spelling of the function.",
            Case(f"{EVALUATE} --scorers python:json:f", "json has no callable f", _PROMPTS),
        ),
        Message(
            "reward judge:{endpoint}: give URL#MODEL, as in http://localhost:8000/v1#MODEL",
            "The URL ends before /chat/completions; the model is the name that the server knows.",
            Case(f"{EVALUATE} --scorers judge:localhost", "give URL#MODEL", _PROMPTS),
        ),
        Message(
            "reward srpo:{spec}: write srpo:REWARD, or srpo:POSITIVE|NEGATIVE:REWARD",
            "Both words are needed.",
            Case(f"{EVALUATE} --scorers 'srpo:good|:clip:x'", "write srpo:REWARD", _PROMPTS),
        ),
        Message(
            "{file}: no such file; it is the aesthetic predictor's head as safetensors",
            "Convert the published head once, as the guide on rewards shows.",
            Case(f"{EVALUATE} --scorers aesthetic:x/clip+head.safetensors", "head.safetensors: no such file", _PROMPTS),
        ),
        Message(
            "{name}: no such folder; give one, or a hub id, OWNER/NAME",
            "Check the path. A hub id has an owner, a slash and a name.",
            Case(f"{EVALUATE} --scorer clip_score:nowhere", "nowhere: no such folder", _PROMPTS),
            Case(f"{EVALUATE} --scorer clip_score:./nowhere/clip", "./nowhere/clip: no such folder", _PROMPTS),
            Case(f"{EVALUATE} --scorers pickscore:./nowhere", "./nowhere: no such folder", _PROMPTS),
            Case(f"{EVALUATE} --features clip:nowhere", "nowhere: no such folder", _PROMPTS),
            Case("distill mine.yaml -s evaluate.features=dinov2:nowhere", "nowhere: no such folder", _RECIPE),
        ),
        Message(
            "{file} is missing: train a classifier with `fewstep emoji train classifier`",
            "The scorer `emoji:FOLDER` takes the folder of a classifier.",
            Case(f"{EVALUATE} --scorer emoji:x", "x/classifier.safetensors", _PROMPTS),
        ),
        Message(
            "an evaluation needs at least 2 prompts, got {count}",
            "Distances and diversity need several images.",
            Case("evaluate tiny --prompts one.txt", "got 1", {"one.txt": "a fox\n"}),
        ),
        Message(
            "{kind} {name}: it takes no checkpoint; write {name}",
            "Leave out the colon and what follows.",
            Case(f"{EVALUATE} --features open-nsfw:x", "open-nsfw:x", _PROMPTS),
        ),
    ),
)
