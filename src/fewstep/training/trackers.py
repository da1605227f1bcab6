"""Experiment trackers besides TensorBoard: Weights & Biases and MLflow, through their own libraries.

Where they write to is decided by the environment variables of these libraries, such as WANDB_MODE, WANDB_PROJECT,
MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME. A resumed run continues the same run in them:
``<run>/trackers.json`` has its identifiers.
"""

from __future__ import annotations

import json
import os
import re
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from fewstep.atomic import write_text
from fewstep.config.recipe import Recipe, flat_recipe
from fewstep.config.sections import TrackerName
from fewstep.errors import UserError
from fewstep.progress import log_line

FILE, PROJECT = "trackers.json", "fewstep"

_PARAMETER_LENGTH = 500  # characters of a value that every MLflow server takes


class ExperimentTracker(Protocol):
    """A run in an experiment tracker."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def image(self, step: int, image: Image.Image) -> None: ...

    def close(self) -> None: ...


class WandbTracker:
    """A run of Weights & Biases, in its mode offline where WANDB_MODE says so; ``run_id`` continues one."""

    def __init__(self, directory: Path, recipe: Recipe, run_id: str | None) -> None:
        import wandb

        self.run_id = run_id or uuid.uuid4().hex[:12]
        self._image = wandb.Image
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            dir=directory,
            name=recipe.name,
            id=self.run_id,
            resume="allow",
            config=recipe.model_dump(mode="json"),
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def image(self, step: int, image: Image.Image) -> None:
        self._run.log({"preview": self._image(image)}, step=step)

    def close(self) -> None:
        self._run.finish()


class MLflowTracker:
    """A run of MLflow; ``run_id`` continues one. Characters that MLflow does not take in a metric's name become
    underscores.
    """

    def __init__(self, recipe: Recipe, run_id: str | None) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric, self._client = Metric, MlflowClient()
        if run_id is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            experiment = self._client.get_experiment_by_name(name)
            experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(name)
            run_id = self._client.create_run(experiment_id, run_name=recipe.name).info.run_id
            values = flat_recipe(recipe.model_dump(mode="json"))
            params = [Param(_mlflow_name(key), str(value)[:_PARAMETER_LENGTH]) for key, value in values.items()]
            self._client.log_batch(run_id, params=params)
        else:
            self._client.update_run(run_id, status="RUNNING")
        self.run_id = run_id

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        self._client.log_batch(
            self.run_id, [self._metric(_mlflow_name(name), value, now, step) for name, value in metrics.items()]
        )

    def image(self, step: int, image: Image.Image) -> None:
        self._client.log_image(self.run_id, image, key="preview", step=step)

    def close(self) -> None:
        self._client.set_terminated(self.run_id)


class Guarded:
    """A tracker that stops at its first failure, with a line in the log: training must not end for it."""

    def __init__(self, name: str, tracker: ExperimentTracker) -> None:
        self._name, self._tracker = name, tracker
        self._failed = False

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._try(lambda: self._tracker.log(step, metrics))

    def image(self, step: int, image: Image.Image) -> None:
        self._try(lambda: self._tracker.image(step, image))

    def close(self) -> None:
        self._try(self._tracker.close)

    def _try(self, call: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            call()
        except Exception as error:  # the library's own, of its network or server
            self._failed = True
            log_line(f"warning: {self._name} failed ({_first_line(error)}); the training continues without it")


def check_trackers(names: Sequence[str]) -> None:
    """Raises: UserError if the library of one is not installed."""
    for name in names:
        if find_spec(name) is None:
            raise UserError(f"train.trackers: {name} is not installed; pip install 'fewstep[{name}]'")


def open_trackers(names: Sequence[TrackerName], directory: Path, recipe: Recipe) -> list[ExperimentTracker]:
    """The trackers of a run, which continue where ``directory`` has one already.

    Raises:
        UserError: one cannot be started.
    """
    file = directory / FILE
    known: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    opened: list[ExperimentTracker] = []
    for name in names:
        try:
            run_id = known.get(name)
            tracker = WandbTracker(directory, recipe, run_id) if name == "wandb" else MLflowTracker(recipe, run_id)
        except Exception as error:  # the library's own, of its network, server or settings
            raise UserError(f"train.trackers: {name} did not start ({_first_line(error)})") from None
        known[name] = tracker.run_id
        opened.append(Guarded(name, tracker))
    if known:
        write_text(file, json.dumps(known) + "\n")
    return opened


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _mlflow_name(name: str) -> str:
    return re.sub(r"[^\w\-./ ]", "_", name)
