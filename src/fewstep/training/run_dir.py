"""The directory of one run: its recipe, metrics, checkpoints and results.

runs/<name>/
    recipe.yaml             as resolved
    fingerprints.json       of the models and files that the recipe names
    metrics.jsonl, events.out.tfevents.*, trackers.json
    checkpoints/  previews/
    model/ or student/  report/
    stages/                 a run for each stage of a recipe with several
"""

import json
import os
import shlex
import shutil
import sys
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from PIL import Image

from fewstep.atomic import atomic_file, write_text
from fewstep.config.load import dump_recipe, parse_recipe, read_yaml
from fewstep.config.recipe import Recipe, flat_recipe
from fewstep.config.sections import TrackerName
from fewstep.errors import UserError
from fewstep.locks import lock
from fewstep.machine import reason
from fewstep.outputs import check_folder
from fewstep.training.claim import Claim
from fewstep.training.trackers import check_trackers, open_trackers
from fewstep.training.tracking import Tracker

RECIPE, FINGERPRINTS = "recipe.yaml", "fingerprints.json"

# What a run writes into its directory besides recipe.yaml: all that `overwrite` may delete.
RUN_FILES = (
    *("checkpoints", "previews", "metrics.jsonl", "events.out.tfevents.*"),
    *("model", "student", "student-best", "report", "vae", "text_encoder", "tokenizer", "cache", "stages", "lora"),
    *("encoded-prompts", "trackers.json", "wandb"),
)

# Keys that may change when a run is resumed: they do not change what one step does.
RESUMABLE_KEYS = (
    *("train.log_every", "train.sample_every", "train.save_every", "train.save_minutes"),
    *("train.max_checkpoints", "train.keep_best", "train.num_threads", "train.on_alert", "train.max_minutes"),
    *("train.clock", "train.trackers"),
    *("train.fsdp_shard_size", "evaluate.", "preview.", "keep_files"),
)


class RunDir:
    """One run in `directory`, new or resumed; a context manager that closes the logs and unlocks the directory.

    recipe: saved as recipe.yaml. A directory that holds a run of another recipe is refused; more steps, another
        cadence of logs and checkpoints, and another evaluation do not make it another recipe.
    overwrite: deletes the files of an earlier run in the directory, and nothing else there, when this one begins.
    fingerprints: of the models and files that the recipe names, by its dotted keys. A path that changed while its
        fingerprint did not is the same model, moved; a fingerprint that changed is another one.
    resume_command: the command that resumes the run after an interruption; by default that of this process.
    read_only: the main process owns the directory: nothing is written or locked here.

    Raises: UserError for another recipe, a directory with other files under a run's names, or one that another process
    is using, and a tracker that is not installed.
    """

    def __init__(
        self,
        directory: str | Path,
        recipe: Recipe,
        *,
        overwrite: bool = False,
        fingerprints: Mapping[str, str] | None = None,
        resume_command: str | None = None,
        read_only: bool = False,
    ) -> None:
        self.directory = Path(directory)
        self.recipe = recipe
        self.fingerprints = dict(fingerprints or {})
        self.resume_command = resume_command or current_command()
        self._tracker: Tracker | None = None
        self._unlock: Callable[[], object] = lambda: None
        self.claim: Claim | None = None
        if read_only:
            return
        check_trackers(self._trackers)
        check_folder(self.directory)
        try:
            self.claim = Claim(self.directory, (RECIPE, FINGERPRINTS))
            self._unlock = weakref.finalize(self, lock(self.directory))
            try:
                self._write_recipe(self.claim, overwrite)
            except BaseException:
                self.claim.take_back()
                self._unlock()
                raise
        except OSError as error:
            raise UserError(f"{self.directory}: cannot write here ({reason(error)})") from None

    @property
    def _trackers(self) -> list[TrackerName]:
        train = getattr(self.recipe, "train", None)  # a recipe of several stages has none of its own
        return [] if train is None else train.trackers

    @property
    def checkpoints(self) -> Path:
        return self.directory / "checkpoints"

    def begin(self) -> None:
        """The run's checks are done: an earlier run that it overwrites is deleted. Until then, an error leaves the
        directory as it was."""
        if self.claim is not None:
            self.claim.keep()

    def track(self, step: int) -> None:
        """Opens the logs, after `step` finished steps."""
        self.begin()
        if self._tracker is not None:
            self._tracker.close()
        self._tracker = Tracker(self.directory, step, open_trackers(self._trackers, self.directory, self.recipe))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line of metrics; call `track` first."""
        assert self._tracker is not None, "RunDir.track comes before RunDir.log"
        self._tracker.log(step, metrics)

    def preview(self, step: int, image: Image.Image) -> None:
        """Saves a preview image as previews/step_<step>.png and to TensorBoard."""
        path = self.directory / "previews" / f"step_{step:06d}.png"
        with atomic_file(path) as aside:
            image.save(aside, "PNG")
        if self._tracker is not None:
            self._tracker.image(step, image)

    def close(self) -> None:
        tracker, self._tracker = self._tracker, None
        try:
            if tracker is not None:
                tracker.close()
        finally:
            self._unlock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, Exception) and self.claim is not None:
            self.claim.take_back()
        else:
            self.begin()
        self.close()
        if isinstance(error, KeyboardInterrupt) and not error.args:
            # Before or after the training: the trainer saves a checkpoint and raises with a message.
            raise KeyboardInterrupt(f"interrupted; resume with: {self.resume_command}") from None

    def _write_recipe(self, claim: Claim, overwrite: bool) -> None:
        path = self.directory / RECIPE
        own = [found for pattern in RUN_FILES for found in sorted(self.directory.glob(pattern))]
        if own and not path.exists():
            raise UserError(
                f"{own[0]} is in the way: {self.directory} is not a run (no recipe.yaml); use another --out"
            )
        for found in own:
            if found.is_dir():  # another user may have started the run
                check_folder(found)
        if overwrite:
            claim.set_aside(own)
        elif own:  # without files of a run, another recipe is fine
            changes = diff_recipes(_resolved(path), self.recipe.model_dump(mode="json"))
            changes = self._without_moved(changes)
            if changes:
                shown = ", ".join(f"{key}: {old} -> {new}" for key, (old, new) in changes.items())
                raise UserError(
                    f"{self.directory} holds a run of another recipe ({shown}); use another --out, or --overwrite"
                )
        write_text(path, dump_recipe(self.recipe))
        if self.fingerprints:
            write_text(self._fingerprint_file, json.dumps(self.fingerprints, indent=1))

    @property
    def _fingerprint_file(self) -> Path:
        return self.directory / FINGERPRINTS

    def _without_moved(self, changes: Mapping[str, tuple[Any, Any]]) -> dict[str, tuple[Any, Any]]:
        """Changes without the paths of what was only moved, and with those whose content is another one."""
        try:
            earlier = json.loads(self._fingerprint_file.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # a run of an earlier version: its paths must be the same
            return dict(changes)
        both = self.fingerprints.keys() & earlier.keys()
        moved = {key for key in both if self.fingerprints[key] == earlier[key]}
        other = dict.fromkeys(sorted(both - moved), ("the one it started with", "one of other content"))
        return {**other, **{key: change for key, change in changes.items() if key not in moved}}


def diff_recipes(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The dotted keys in which two resolved recipes differ, without those that may change when a run is resumed."""
    before, after = flat_recipe(old), flat_recipe(new)
    changed = {
        key: (before.get(key, "(none)"), after.get(key, "(none)"))
        for key in dict.fromkeys([*after, *before])
        if before.get(key) != after.get(key) and not key.startswith(RESUMABLE_KEYS)
    }
    was, is_now = changed.get("train.steps", (None, None))
    if isinstance(was, int) and isinstance(is_now, int) and is_now > was:
        del changed["train.steps"]
    return changed


def current_command() -> str:
    """The command line of this process without --overwrite, quoted for a shell.

    A program around this one, such as a Makefile, sets FEWSTEP_RESUME_COMMAND to the command to type instead.
    """
    if command := os.environ.get("FEWSTEP_RESUME_COMMAND"):
        return command
    program = Path(sys.argv[0])
    found = shutil.which(program.name)
    if program.name == "__main__.py":
        words = [_short(Path(sys.executable)), "-m", "fewstep"]
    elif found is not None and Path(found).resolve() == program.resolve():
        words = [program.name]
    else:
        words = [_short(program)]
    return shlex.join(words + [word for word in sys.argv[1:] if word != "--overwrite"])


def _short(path: Path) -> str:
    """A path relative to the working directory if it lies below it."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _resolved(path: Path) -> dict[str, Any]:
    """A saved recipe with defaults for keys that are newer than it is."""
    saved = read_yaml(path)
    try:
        return parse_recipe(saved, str(path)).model_dump(mode="json")
    except UserError:
        return saved
