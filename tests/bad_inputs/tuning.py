"""Searches: the space, the metric, the budget, and the folder."""

from bad_inputs.files import DISTILL, PROMPTS
from bad_inputs.table import Case, Message, Section

_FILES = {
    "mine.yaml": DISTILL.replace("{enabled: false}", "{enabled: false, scorers: [emoji]}"),
    "prompts.txt": PROMPTS,
    "emoji.txt": "a noto emoji of a red apple on a blue background\n",
    "space.yaml": "metric: hf_energy\ndirection: max\noptim.student.lr: [0.01, 0.02]\n",
}
_TUNE = "tune mine.yaml --space space.yaml --minutes 5 -s prompts.validation_source=emoji.txt"


def _space(text: str, expected: str) -> Case:
    return Case(_TUNE, expected, _FILES | {"space.yaml": text})


SECTION = Section(
    "Hyperparameter search",
    "The space, the metric and the budget are checked before the teacher is loaded.",
    (
        Message(
            "{file}: no key to search; give some, as in optim.student.lr: {low: 1.0e-4, high: 1.0e-3}",
            "The file names no recipe key.",
            _space("metric: object_acc\n", "space.yaml"),
        ),
        Message(
            "{file}: No such file or directory",
            "The space is a file that you write.",
            Case("tune mine.yaml --space spac.yaml --minutes 5", "spac.yaml", _FILES),
        ),
        Message(
            "{file}: a search space is a mapping of keys to values",
            "The file is empty, or holds a list or a single value.",
            _space("", "space.yaml"),
        ),
        Message(
            "{file}: {key}: cannot be searched: {reason}",
            "These keys are the same in all trials.",
            _space("prompts.source: [a.txt, b.txt]\n", "prompts.source: cannot be searched: all trials must train"),
            _space("train.steps: [10, 20]\n", "--trial-minutes"),
        ),
        Message(
            "{file}: {key}: {value}: expected a list of choices, or {low: ..., high: ...} with log: true or step",
            "A single value is none of these; set it with `-s`.",
            _space("optim.student.lr: 0.01\n", "optim.student.lr: 0.01"),
        ),
        Message(
            "{file}: {key}: {problem}; expected a list of choices, or {low: ..., high: ...} with log: true or step",
            "A range has `low` and `high`, and may have `log` or `step`.",
            _space("optim.student.lr: {low: 0.01, hihg: 0.02}\n", "unknown key hihg"),
            _space("optim.student.lr: {low: 0.01}\n", "low or high is missing"),
        ),
        Message(
            "{file}: {key}: give at least 2 choices; set a single value with -s {key}=...",
            "There is nothing to search among fewer.",
            _space("optim.student.lr: [0.01]\n", "-s optim.student.lr"),
        ),
        Message(
            "{file}: {key}: {value} is given twice",
            "1, 1.0 and true count as the same choice.",
            _space("optim.student.lr: [0.01, 0.01]\n", "0.01 is given twice"),
        ),
        Message(
            "{file}: {key}: {name}: expected a number, not {value}",
            "YAML reads 1e-4 as text; the message has the number as YAML takes it.",
            _space("optim.student.lr: {low: 1e-4, high: 0.1}\n", 'not "1e-4"; write 1.0e-04'),
            _space("optim.student.lr: {low: true, high: 0.1}\n", "low: expected a number, not true"),
        ),
        Message(
            "{file}: {key}: low {low} is not below high {high}",
            "Exchange them.",
            _space("optim.student.lr: {low: 0.2, high: 0.1}\n", "low 0.2"),
        ),
        Message(
            "{file}: {key}: log: true needs low above 0, and no step",
            "The logarithm of 0 is no number.",
            _space("optim.student.lr: {low: 0.0, high: 0.1, log: true}\n", "optim.student.lr"),
        ),
        Message(
            "{file}: {key}: log: expected true or false, not {value}",
            "Write `log: true`.",
            _space("optim.student.lr: {low: 0.01, high: 0.1, log: 10}\n", "not 10"),
        ),
        Message(
            "{file}: {key}: step: expected a number above 0 and at most high - low, not {step}",
            "It is the distance of neighboring values.",
            _space("train.batch_size: {low: 1, high: 4, step: 8}\n", "not 8"),
        ),
        Message(
            "{file}: {key}: {value}: {problem}",
            "The recipe has no such key, or the key cannot have this value; a key that is close is named.",
            _space("optim.studnt.lr: [0.01, 0.02]\n", "optim.studnt"),
            _space("optim.student.lrr: [0.01, 0.02]\n", "lrr"),
            _space("optim.student.lr: [0.01, fast]\n", '"fast"'),
            _space("train.batch_size: {low: 0, high: 4}\n", "train.batch_size: 0"),
        ),
        Message(
            "{source}: no metric; name one of {names}, as in metric: {name}",
            "The metric is named in the space, or with `--metric`.",
            _space("optim.student.lr: [0.01, 0.02]\n", "space.yaml: no metric"),
        ),
        Message(
            "{source}: metric {name}: not measured on validation prompts; there are {names}",
            "The scorers in `evaluate.scorers` have no such score, or it applies to none of the prompts.",
            Case(f"{_TUNE} --metric accuracy", "--metric: metric accuracy", _FILES),
        ),
        Message(
            "{source}: direction {direction}: expected max or min",
            "More is better, or less is.",
            Case(f"{_TUNE} --direction up", "direction up", _FILES),
        ),
        Message(
            "{source}: metric {name}: whether more is better is not known; give direction: max, or min",
            "The direction is named in the space, or with `--direction`.",
            Case(f"{_TUNE} --metric saturation", "metric saturation", _FILES),
        ),
        Message(
            "--trial-minutes and --trial-steps: give one of them",
            "Either limits a whole trial.",
            Case(f"{_TUNE} --trial-minutes 1 --trial-steps 5", "give one", _FILES),
        ),
        Message(
            "--minutes {minutes}: less than one trial takes, which has {minutes} minutes",
            "The search has time for several whole trials.",
            Case(f"{_TUNE} --trial-minutes 6", "--minutes 5", _FILES),
        ),
        Message(
            "{recipe}: its kind is {kind}; a search tries recipes of kind distill",
            "Stages are tuned one by one, each as a recipe of its own.",
            Case("tune micro-long --space space.yaml --minutes 5", "its kind is stages", _FILES),
        ),
        Message(
            "prompts.source={source}: no validation prompts; name a file in prompts.validation_source",
            "The source is too short to hold any out.",
            Case(
                "tune mine.yaml --space space.yaml --minutes 5 -s prompts.heldout_fraction=0", "prompts.txt: no", _FILES
            ),
        ),
        Message(
            "{file} is in the way: {folder} is not a search (no search.json); use another --out",
            "The folder holds files under names that a search uses.",
            Case(f"{_TUNE} --out old", "old/trials.csv", _FILES | {"old/trials.csv": "mine"}),
            Case(f"{_TUNE} --out old --overwrite", "old/cache", _FILES | {"old/cache/a.txt": "mine"}),
        ),
        Message(
            "{file}: cannot be read ({reason}); use another --out, or --overwrite",
            "The description of the search in the folder is damaged.",
            Case(f"{_TUNE} --out old", "old/search.json", _FILES | {"old/search.json": "{}"}),
        ),
    ),
)
