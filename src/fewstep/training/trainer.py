"""The training loop: updates a method's trainables in turn, validates, logs, saves and resumes."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fewstep.config.sections import OptimSettings, TrainSettings
from fewstep.core.compiler import eager
from fewstep.core.method import Batch, BatchSource, Method
from fewstep.errors import StopTraining, UserError
from fewstep.progress import log_line, training_display
from fewstep.training import checkpoint
from fewstep.training.alerts import Alert, AlertMonitor, Rule
from fewstep.training.best import Best, missing_metric, new_best
from fewstep.training.checkpoint_writer import CheckpointWriter
from fewstep.training.distributed import DistContext
from fewstep.training.malloc import retain_freed_memory
from fewstep.training.rng_state import rng_state, set_rng_state
from fewstep.training.run_dir import RunDir
from fewstep.training.stop_requests import stop_requests
from fewstep.training.stream_state import restore_stream, stream_states
from fewstep.training.tracking import RunningMeans
from fewstep.training.train_state import TrainState


class Trainer:
    """Trains a method's trainables for `train.steps` steps, from the newest checkpoint of `run` if it has one.

    method: its modules are on their device already; seed torch before making them, for reproducible runs.
    source: called as `source(position, dist.shard)`, gives this process's rows of a batch.
    optim: settings of the optimizer by trainable's name; dist: the processes that train together.
    preview: step -> image or None, called every `train.sample_every` steps with the averaged weights.
    validate: metrics of the averaged weights, every `validate_every` steps, 0 is never; validate_first: and before all.
    alert_rules: metrics that mean trouble; `train.on_alert` decides what happens.
    on_save: called with the step after every checkpoint, with the averaged weights.

    On the CPU a training that is interrupted and resumed gives the same weights, bit for bit, as an uninterrupted one.
    """

    def __init__(
        self,
        method: Method,
        source: BatchSource,
        run: RunDir,
        *,
        train: TrainSettings,
        optim: Mapping[str, OptimSettings],
        preview: Callable[[int], Image.Image | None] | None = None,
        validate: Callable[[], Mapping[str, float]] | None = None,
        validate_every: int = 0,
        validate_first: bool = False,
        alert_rules: Sequence[Rule] = (),
        on_save: Callable[[int], None] | None = None,
        dist: DistContext | None = None,
    ) -> None:
        self.method, self.source, self.run, self.train, self.preview = method, source, run, train, preview
        self.validate, self.validate_every, self.validate_first = validate, validate_every, validate_first
        self.alert_rules, self.on_save, self.ended = alert_rules, on_save, False  # ended by an alert
        self.dist, self._until = dist or DistContext(), train.steps  # until: of the present `fit`
        self._notice = log_line if self.dist.is_main_process else lambda _: None
        self.train_states = [TrainState(part, optim[part.name], train, self.dist) for part in method.trainables]
        self._writer = CheckpointWriter(self.dist, train.async_checkpoints)
        self.step = self.position = 0  # finished steps, used batches
        self.seconds = 0.0  # of training, over all sessions
        self.now = time.thread_time if train.clock == "thread" else time.monotonic
        self.best: Best | None = None  # by `train.keep_best`, so far
        self.first: dict[str, float] = {}  # the first logged value of each metric
        self._reported: set[str] = set()
        self._means, self._saved = RunningMeans(), (0, time.monotonic())  # step and time of the last checkpoint

    def fit(self, until: int | None = None) -> None:
        """Trains to the last step, or to step `until`, from which the next call continues. At the end the trainables
        have their live weights; see `ema_weights`. Ctrl-C (or SIGTERM) stops after the present step, with a checkpoint.

        Raises: KeyboardInterrupt, with a message for the user, after such a checkpoint; UserError if losses stay
        nonfinite, an alert or the method stops the run, or a checkpoint cannot be written or does not fit the method.
        """
        retain_freed_memory()
        self._until = self.train.steps if until is None else min(until, self.train.steps)
        if self.train.num_threads is not None:
            torch.set_num_threads(self.train.num_threads)
        if self.step == 0:  # else an earlier call ended, and its state is here
            torch.manual_seed(self.train.seed)
            self._restore()
        if self.dist.is_main_process:
            self.run.track(self.step)
        if self.done:
            return
        self._alerts = AlertMonitor(self.alert_rules, self.step, self.first)
        start = self.now() - self.seconds
        with ExitStack() as stack:
            stack.callback(self._writer.wait)
            name, notes = self.run.recipe.name, {part.name: part.loss_meaning for part in self.method.trainables}
            display = training_display(name, self.step, self.train.steps, self.train.log_every, notes)
            shown = stack.enter_context(display) if self.dist.is_main_process else None
            stop = stack.enter_context(stop_requests())
            if self.validate is not None and self.validate_first and self.step == 0:
                with self._evaluating():
                    self._log(self.validate())
            while not self.done:
                try:
                    losses = self.take_step()
                except StopTraining:
                    self._save()
                    raise
                # the same on all processes, which must stop at the same step
                self.seconds, stopping = self.dist.all_reduce_max(self.now() - start, float(stop.is_set()))
                if shown is not None:
                    shown.update(self.step, losses)
                self._after_step()
                if stopping:
                    self._save()
                    at = f"{self.step}/{self.train.steps}"
                    raise KeyboardInterrupt(f"saved step {at}; resume with: {self.run.resume_command}")

    @property
    def done(self) -> bool:
        """Whether the last step of `fit` was taken, the time is up, or an alert ended the training."""
        return self.ended or self.step >= self._until or self.seconds >= 60 * (self.train.max_minutes or math.inf)

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Inside, each trainable with an EMA has its averaged weights, and all are in eval mode."""
        modes = [(module, module.training) for state in self.train_states for module in state.module.modules()]
        with ExitStack() as stack:
            for state in self.train_states:
                if state.ema is not None:
                    stack.enter_context(state.ema.applied())
                state.module.eval()
            try:
                yield
            finally:
                for module, training in modes:
                    module.training = training

    def load_best(self) -> bool:
        """Loads the best checkpoint by `train.keep_best`; False if there is none, or it is the last one."""
        if self.best is None or self.best.step == self.step:
            return False
        try:
            self._load_state(checkpoint.load_step(self.run.checkpoints, self.best.step, self.dist))
        except checkpoint.CorruptCheckpoint as problem:
            self._notice(f"{self.run.checkpoints}: the best one, step {self.best.step}, is lost: {problem}")
            return False
        return True

    def take_step(self) -> dict[str, float]:
        """One step; returns each trainable's last loss."""
        losses: dict[str, float] = {}
        collected: list[Any] | None = None
        self.method.before_step(self.step)
        for state in self.train_states:
            part = state.trainable
            if self.step < part.start_step:
                continue
            for _ in range(part.updates_per_step):
                if part.uses_collected:
                    collected = batches = collected or self._collect()
                else:
                    batches = self._next_batches()
                metrics = state.update(batches, self.step + 1)
                for other in self.train_states:
                    other.optimizer.zero_grad()
                self._means.add({f"{state.name}/{key}": value for key, value in metrics.items()})
                losses[state.name] = metrics.get("loss", float("nan"))
        self.step += 1
        self._means.add(self.method.after_step(self.step))
        return losses

    def _next_batches(self) -> list[Batch]:
        """This process's rows of the batches of one update."""
        first, count = self.position, self.train.gradient_accumulation_steps
        self.position += count
        return [self.source(position, self.dist.shard) for position in range(first, first + count)]

    def _collect(self) -> list[Any]:
        """What the method makes of new batches, for all updates of this step that share it."""
        batches = self._next_batches()
        with torch.no_grad(), self.train_states[0].loss_context():
            return [self.method.collect(batch) for batch in batches]

    def _after_step(self) -> None:
        """Validates, logs, previews and saves where this step is due for it."""
        train, last, improved = self.train, self.done, False
        validated: Mapping[str, float] = {}
        alert: Alert | None = None
        if self.validate is not None and self.validate_every and (self.step % self.validate_every == 0 or last):
            with self._evaluating():
                validated = self.validate()
        if self.step % train.log_every == 0 or last or validated:
            metrics = {**self._means.take(), **validated}
            self._log(metrics)
            improved = self._is_best(metrics)
            alert = self._alerts.check(self.step, metrics) if train.on_alert != "off" else None
        if self.preview is not None and train.sample_every and (self.step % train.sample_every == 0 or last):
            with self._evaluating():
                image = self.preview(self.step)
            if image is not None and self.dist.is_main_process:
                self.run.preview(self.step, image)
        due = train.save_minutes is not None and time.monotonic() - self._saved[1] >= 60 * train.save_minutes
        if self.step % train.save_every == 0 or due or last or improved:
            self._save()
        if alert is not None:
            self._on_alert(alert)

    def _log(self, metrics: Mapping[str, float]) -> None:
        self.first |= {name: value for name, value in metrics.items() if name not in self.first}
        if self.dist.is_main_process:
            self.run.log(self.step, {**metrics, "seconds": self.seconds})

    def _is_best(self, metrics: Mapping[str, float]) -> bool:
        """Whether a line of metrics is the best so far; if so, it is remembered. Reports a missing metric once."""
        missing = missing_metric(self.train.keep_best, metrics, self.step, self._reported)
        if missing:
            self._notice(missing)
        found = new_best(self.best, self.train.keep_best, self.step, metrics, self.first)
        self.best = found or self.best
        return found is not None

    def _on_alert(self, alert: Alert) -> None:
        """Reports an alert, and stops or rolls back if `train.on_alert` says so."""
        self._notice(f"step {self.step}: {alert}")
        if self.train.on_alert == "stop":
            self._save()
            raise UserError(f"{self.run.directory}: stopped at step {self.step} by an alert: {alert}")
        if self.train.on_alert == "rollback":
            self._writer.wait()
            good = checkpoint.rollback(self.run.checkpoints, alert.since, self.dist)
            if good is None:
                raise UserError(f"{self.run.directory}: no checkpoint is left from before the alert: {alert}")
            self._load_state(good)
            self.ended = True
            self._save(again=True)  # for a resumed run, which would otherwise take the same steps again
            self._notice(f"rolled back to step {self.step}; the training ends here")

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Inside, averaged weights, no gradient, and a random state that is restored: evaluating changes nothing."""
        with torch.random.fork_rng(), torch.no_grad(), eager(), self.ema_weights():
            yield

    def _save(self, again: bool = False) -> None:
        """Writes a checkpoint; one of the same step only if it is written again."""
        if self.step == self._saved[0] and not again:
            return
        groups: dict[str, Mapping[str, Tensor]] = {
            "random": rng_state(self.dist.device),
            "method": self.method.state_dict(),
        }
        for state in self.train_states:
            groups |= {f"{state.name}.{part}": tensors for part, tensors in state.tensors().items()}
        values = {
            "position": self.position,
            "stream": stream_states(self.source, self.dist),
            "seconds": self.seconds,
            "means": self._means.state(),
            "trainables": {state.name: state.counters for state in self.train_states},
            "best": self.best.state() if self.best is not None else None,
            "first": self.first,
            "ended": self.ended,
        }
        kept, protect = self.train.max_checkpoints, [] if self.best is None else [self.best.step]
        self._writer.write(self.run.checkpoints, self.step, groups, values, kept, protect)
        self._saved = (self.step, time.monotonic())
        if self.on_save is not None:
            with self._evaluating():
                self.on_save(self.step)

    def _restore(self) -> None:
        found = checkpoint.latest(self.run.checkpoints, self._notice, self.dist)
        if found is not None:
            self._load_state(found)
            ended = f"an alert ended it at step {self.step}; -s train.on_alert=warn continues"
            self._notice(f"{self.run.directory}: {ended if self.ended else f'resuming from step {self.step}'}")

    def _load_state(self, found: checkpoint.Checkpoint) -> None:
        """Restores everything to the state of a checkpoint."""
        try:
            for state in self.train_states:
                state.restore(found, found.state["trainables"][state.name])
            self.method.load_state_dict(found.read("method"))
            restore_stream(self.source, found, self.dist)
        except (KeyError, RuntimeError) as error:
            raise UserError(
                f"{self.run.checkpoints}: step {found.step} is not of this method and model ({error}); "
                "use another --out, or --overwrite"
            ) from error
        self.step, self.position, self.seconds = found.step, found.state["position"], found.state["seconds"]
        self._means = RunningMeans(found.state["means"])
        self.best = Best.restored(found.state["best"], self.train.keep_best)
        self.first = found.state.get("first", {})
        self.ended = found.state.get("ended", False) and self.train.on_alert == "rollback"  # others resume it
        self._saved = (found.step, time.monotonic())
        set_rng_state(found.read("random"), self.dist.device)
