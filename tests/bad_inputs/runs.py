"""Folders of runs, caches and encoded prompts that belong to something else."""

from bad_inputs.files import CACHE, DISTILL, PROMPTS
from bad_inputs.table import Case, Message, Section

_RECIPE = {"mine.yaml": DISTILL, "prompts.txt": PROMPTS}
_CACHE = {"cache.yaml": CACHE, "prompts.txt": PROMPTS}

SECTION = Section(
    "Earlier runs and other people's folders",
    "Only files that the same command wrote are replaced, and only with `--overwrite`.",
    (
        Message(
            "{file} is in the way: {folder} is not a run (no recipe.yaml); use another --out",
            "The folder holds files under names that a run uses.",
            Case("distill mine.yaml --out old", "old/metrics.jsonl", _RECIPE | {"old/metrics.jsonl": "mine"}),
            Case("distill mine.yaml --out old --overwrite", "old/student", _RECIPE | {"old/student/a.txt": "mine"}),
            Case("distill mine.yaml --out tiny", "tiny/", _RECIPE),
            Case("emoji train classifier --out old", "old/model", {"old/model/model.bin": "mine"}),
        ),
        Message(
            "{folder} holds a run of another recipe ({changes}); use another --out, or --overwrite",
            "Resuming takes the recipe that began the run. The keys that differ are listed.",
            Case(
                "distill mine.yaml --out old",
                "train.batch_size: 3 -> 2",
                _RECIPE
                | {"old/recipe.yaml": DISTILL.replace("batch_size: 2", "batch_size: 3"), "old/metrics.jsonl": ""},
            ),
            Case(
                "distill mine.yaml --out old",
                "kind: classifier -> distill",
                _RECIPE | {"old/recipe.yaml": "kind: classifier\nname: mine\n", "old/metrics.jsonl": ""},
            ),
        ),
        Message(
            "{file}: no such file; give the directory of a finished run that was evaluated",
            "A card quotes the report of a run: run `fewstep distill` without `-s evaluate.enabled=false`.",
            Case("emoji publish-student nothing --out model", "nothing/report/metrics.json"),
        ),
        Message(
            "{file}: a recipe is a mapping of keys to values",
            "The file is empty, or holds something else: the earlier run is damaged.",
            Case(
                "distill mine.yaml --out old",
                "old/recipe.yaml",
                _RECIPE | {"old/recipe.yaml": "", "old/metrics.jsonl": ""},
            ),
        ),
        Message(
            "{folder}: has files but no index.json; use another --out",
            "The folder is no cache of trajectories; nothing in it is touched.",
            Case("cache-trajectories cache.yaml --out old", "old", _CACHE | {"old/notes.md": "mine"}),
            Case("cache-trajectories cache.yaml --out old --overwrite", "old", _CACHE | {"old/notes.md": "mine"}),
            Case("cache-trajectories cache.yaml --out tiny", "tiny", _CACHE),
        ),
        Message(
            "{file} was not written by fewstep cache-trajectories; use another --out",
            "With `--overwrite`, a folder that also holds other files is left alone.",
            Case(
                "cache-trajectories cache.yaml --out old --overwrite",
                "old/notes.md",
                _CACHE | {"old/notes.md": "mine", "old/index.json": "{}"},
            ),
        ),
        Message(
            "{folder} already holds encoded prompts; use another --out, or --overwrite",
            "A finished folder is never added to.",
            Case(
                "encode-prompts prompts.txt --out old --model tiny",
                "old already holds",
                {"prompts.txt": PROMPTS, "old/index.json": "{}"},
            ),
        ),
        Message(
            "{file} was not written by fewstep encode-prompts; use another --out",
            "With `--overwrite`, a folder that also holds other files is left alone.",
            Case(
                "encode-prompts prompts.txt --out old --model tiny --overwrite",
                "old/notes.md",
                {"prompts.txt": PROMPTS, "old/notes.md": "mine"},
            ),
        ),
        Message(
            "{file}: cannot be read ({reason}); use --overwrite",
            "The progress of an interrupted command is damaged.",
            Case(
                "encode-prompts prompts.txt --out old --model tiny",
                "old/seen.sqlite",
                {"prompts.txt": PROMPTS, "old/seen.sqlite": "not a database " * 100},
            ),
        ),
        Message(
            "{file}: cannot be read ({reason})",
            "The file is damaged, or of another kind.",
            Case("cache-trajectories cache.yaml --out old", "old/index.json", _CACHE | {"old/index.json": "{}"}),
            Case("cache-trajectories cache.yaml --out old", "old/index.json", _CACHE | {"old/index.json": "[1, "}),
            Case("emoji publish nowhere --out model", "nowhere/metrics.jsonl"),
        ),
        Message(
            "{file}: already exists; choose another --out",
            "`convert` never replaces anything.",
            Case("convert tiny --out old", "old: already", {"old/notes.md": "mine"}),
            Case("convert tiny --out tiny", "tiny: already"),
            Case("convert tiny --out old.safetensors --to original", "old.safetensors", {"old.safetensors": "mine"}),
        ),
        Message(
            "{file} is in the way (no generation.json beside it); use another --out",
            "The folder holds numbered images of another program.",
            Case("generate tiny 'a fox' --out old/", "old/0000.png", {"old/0000.png": "mine"}),
        ),
        Message(
            "{folder}: holds other files than a model, and saving would delete them; use another folder",
            "Give a new folder.",
            Case("emoji publish runs/a --out old", "old: holds", {"old/notes.md": "mine"}),
        ),
    ),
)
