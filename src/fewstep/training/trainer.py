"""The loop: lets a method's trainables move in turn, and looks after everything around that."""

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import FrameType

import torch
from PIL import Image
from torch import Tensor

from fewstep.config.sections import OptimSettings, TrainSettings
from fewstep.core.method import Batch, Method
from fewstep.errors import UserError
from fewstep.progress import log_line, training_display
from fewstep.training import checkpoint
from fewstep.training.alerts import Alert, AlertMonitor, AlertRule
from fewstep.training.distributed import DistContext
from fewstep.training.malloc import retain_freed_memory
from fewstep.training.run_dir import RunDir
from fewstep.training.tracking import RunningMeans
from fewstep.training.train_state import TrainState


class Trainer:
    """Trains a method's trainables for `train.steps` steps, from the newest checkpoint of `run` if it has one.

    method: its modules are on their device already; seed torch before making them, for runs that can be repeated.
    data: batch number -> batch, a pure function: the position in the data is then one integer.
    optim: settings of the optimizer by trainable's name.
    preview: step -> image or None, called every `train.sample_every` steps with averaged weights in place.
    watch: gives metrics of the averaged weights, called every `watch_every` steps; 0 is never.
    alarms: what in the metrics means trouble; `train.on_alert` says what follows.
    dist: the processes that train together; `data` gives the whole batch, of which each takes its rows.

    On the CPU a training that was interrupted and resumed gives, bit for bit, what an uninterrupted one gives.
    """

    def __init__(
        self,
        method: Method,
        data: Callable[[int], Batch],
        run: RunDir,
        *,
        train: TrainSettings,
        optim: Mapping[str, OptimSettings],
        preview: Callable[[int], Image.Image | None] | None = None,
        watch: Callable[[], Mapping[str, float]] | None = None,
        watch_every: int = 0,
        alarms: Sequence[AlertRule] = (),
        dist: DistContext | None = None,
    ) -> None:
        self.method, self.data, self.run, self.train, self.preview = method, data, run, train, preview
        self.watch, self.watch_every = watch, watch_every
        self.alarms = alarms
        self.ended = False  # by an alarm
        self.dist = dist or DistContext()
        self.learners = [
            TrainState(trainable, optim[trainable.name], train, self.dist) for trainable in method.trainables
        ]
        self.step = 0  # steps done
        self.position = 0  # batches taken
        self.seconds = 0.0  # spent training, over all sittings
        self.best: tuple[int, float] | None = None  # step and value of the best `train.keep_best` so far
        self._means = RunningMeans()
        self._saved = (0, time.monotonic())  # step and time of the last checkpoint

    def fit(self) -> None:
        """Trains to the last step. At the end the trainables have their live weights; see `averaged`.

        Ctrl-C (or SIGTERM) lets the present step finish and saves a checkpoint.

        Raises: KeyboardInterrupt, with what to tell the user, after such a save; UserError if losses stay non-finite,
        an alarm stops the run, or a checkpoint cannot be written or does not fit the method.
        """
        retain_freed_memory()
        if self.train.num_threads is not None:
            torch.set_num_threads(self.train.num_threads)
        torch.manual_seed(self.train.seed)
        self._restore()
        if self.dist.is_main_process:
            self.run.track(self.step)
        if self.done:
            return
        self._watchdog = AlertMonitor(self.alarms, self.step)
        stopping = 0.0
        sitting = time.monotonic() - self.seconds
        with ExitStack() as stack:
            shown = training_display(self.run.recipe.name, self.step, self.train.steps, self.train.log_every)
            show = stack.enter_context(shown) if self.dist.is_main_process else None
            stop = stack.enter_context(_stop_requests())
            while not self.done:
                losses = self._take_step()
                # the same for all processes, which must stop at the same step
                self.seconds, stopping = self.dist.all_reduce_max(time.monotonic() - sitting, float(stop.is_set()))
                if show is not None:
                    show.update(self.step, losses)
                self._log_and_save()
                if stopping:
                    break
        if stopping:
            self._save()
            raise KeyboardInterrupt(
                f"saved step {self.step}/{self.train.steps}; resume with: {self.run.resume_command}"
            )

    @property
    def done(self) -> bool:
        """Whether the last step was taken, the time is up, or an alarm ended it."""
        minutes = self.train.max_minutes
        late = minutes is not None and self.seconds >= 60 * minutes
        return self.step >= self.train.steps or late or self.ended

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Inside, each trainable with an EMA has its averaged weights, and all are in eval mode."""
        modes = [(module, module.training) for learner in self.learners for module in learner.module.modules()]
        with ExitStack() as stack:
            for learner in self.learners:
                if learner.ema is not None:
                    stack.enter_context(learner.ema.applied())
                learner.module.eval()
            try:
                yield
            finally:
                for module, training in modes:
                    module.training = training

    def _take_step(self) -> dict[str, float]:
        """One step; returns the trainables' last losses."""
        losses = {}
        self.method.before_step(self.step)
        for learner in self.learners:
            if self.step < learner.trainable.start_step:
                continue
            for _ in range(learner.trainable.updates_per_step):
                batches = [
                    self.dist.shard(self.data(self.position + i)) for i in range(self.train.gradient_accumulation_steps)
                ]
                self.position += self.train.gradient_accumulation_steps
                metrics = learner.update(batches, self.step + 1)
                for other in self.learners:
                    other.optimizer.zero_grad()
                self._means.add({f"{learner.name}/{key}": value for key, value in metrics.items()})
                losses[learner.name] = metrics.get("loss", float("nan"))
        self.step += 1
        self._means.add(self.method.after_step(self.step))
        return losses

    def _log_and_save(self) -> None:
        train, last, improved = self.train, self.done, False
        watched: Mapping[str, float] = {}
        raised: Alert | None = None
        if self.watch is not None and self.watch_every and (self.step % self.watch_every == 0 or last):
            with self._eval_mode():
                watched = self.watch()
        if self.step % train.log_every == 0 or last or watched:
            metrics = {**self._means.take(), **watched}
            improved = self._is_best(metrics)
            if self.dist.is_main_process:
                self.run.log(self.step, {**metrics, "seconds": self.seconds})
            raised = self._watchdog.check(self.step, metrics) if train.on_alert != "off" else None
        if self.preview is not None and train.sample_every and (self.step % train.sample_every == 0 or last):
            with self._eval_mode():
                image = self.preview(self.step)
            if image is not None and self.dist.is_main_process:
                self.run.preview(self.step, image)
        late = train.save_minutes is not None and (time.monotonic() - self._saved[1] >= 60 * train.save_minutes)
        if self.step % train.save_every == 0 or late or last or improved:
            self._save()
        if raised is not None:
            self._on_alert(raised)

    def _is_best(self, metrics: Mapping[str, float]) -> bool:
        """Whether a line of metrics is the best so far by `train.keep_best`; then it is kept in mind."""
        wanted = self.train.keep_best
        value = metrics.get(wanted.metric) if wanted is not None else None
        if wanted is None or value is None or not math.isfinite(value):
            return False
        sign = 1 if wanted.mode == "max" else -1
        if self.best is not None and sign * value <= sign * self.best[1]:
            return False
        self.best = (self.step, value)
        return True

    def load_best(self) -> bool:
        """Takes up the best checkpoint by `train.keep_best` once the training has ended; False if there is none, or it
        is the last one anyway."""
        if self.best is None or self.best[0] == self.step:
            return False
        try:
            self._load_state(checkpoint.load_step(self.run.checkpoints, self.best[0], self.dist))
        except checkpoint.CorruptCheckpoint as problem:
            if self.dist.is_main_process:
                log_line(f"{self.run.checkpoints}: the best, step {self.best[0]}, is lost: {problem}")
            return False
        return True

    def _on_alert(self, raised: Alert) -> None:
        """Says what an alarm says, and does what `train.on_alert` wants."""
        if self.dist.is_main_process:
            log_line(f"step {self.step}: {raised}")
        if self.train.on_alert == "stop":
            self._save()
            raise UserError(f"{self.run.directory}: stopped at step {self.step} by an alarm: {raised}")
        if self.train.on_alert == "rollback":
            good = checkpoint.rollback(self.run.checkpoints, raised.since, self.dist)
            if good is None:
                raise UserError(f"{self.run.directory}: no checkpoint is left from before the trouble: {raised}")
            self._load_state(good)
            self.ended = True
            if self.dist.is_main_process:
                log_line(f"back to step {self.step}, where it ends")

    @contextmanager
    def _eval_mode(self) -> Iterator[None]:
        """A look at the averaged weights; the random state is put back, so that a run is the same however often one
        looks at it."""
        with torch.random.fork_rng(), torch.no_grad(), self.ema_weights():
            yield

    def _save(self) -> None:
        if self.step == self._saved[0]:
            return
        groups: dict[str, dict[str, Tensor]] = {"random": _random_state()}
        for learner in self.learners:
            groups |= {f"{learner.name}.{part}": tensors for part, tensors in learner.tensors().items()}
        state = {
            "position": self.position,
            "seconds": self.seconds,
            "means": self._means.state(),
            "trainables": {learner.name: learner.counters for learner in self.learners},
            "best": self.best,
        }
        protect = [] if self.best is None else [self.best[0]]
        keep = self.train.max_checkpoints
        checkpoint.save(self.run.checkpoints, self.step, groups, state, keep, protect, self.dist)
        self._saved = (self.step, time.monotonic())

    def _restore(self) -> None:
        found = checkpoint.latest(
            self.run.checkpoints, log_line if self.dist.is_main_process else lambda _: None, self.dist
        )
        if found is not None:
            self._load_state(found)
            if self.dist.is_main_process:
                log_line(f"{self.run.directory}: resuming from step {self.step}")

    def _load_state(self, found: checkpoint.Checkpoint) -> None:
        """Everything as it was when the checkpoint was made."""
        try:
            for learner in self.learners:
                learner.restore(found, found.state["trainables"][learner.name])
        except (KeyError, RuntimeError) as error:
            raise UserError(
                f"{self.run.checkpoints}: step {found.step} is not of this method and model ({error}); "
                "use another --out, or --overwrite"
            ) from error
        self.step, self.position, self.seconds = found.step, found.state["position"], found.state["seconds"]
        self._means = RunningMeans(found.state["means"])
        self.best = found.state.get("best")
        self._saved = (found.step, time.monotonic())
        _set_random_state(found.read("random"))


def _random_state() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state |= {f"cuda{index}": rng for index, rng in enumerate(torch.cuda.get_rng_state_all())}
    return state


def _set_random_state(state: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            if f"cuda{index}" in state:
                torch.cuda.set_rng_state(state[f"cuda{index}"], index)


@contextmanager
def _stop_requests() -> Iterator[threading.Event]:
    """Inside, the first Ctrl-C or SIGTERM sets the event; a second one interrupts at once, as usual."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may handle signals
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def request(number: int, frame: FrameType | None) -> None:
        stop.set()
        # Not print: it may have been interrupted itself, and cannot be entered twice.
        os.write(2, b"\nstopping after this step ...\n")
        for signal_number, handler in before.items():
            signal.signal(signal_number, handler)

    for number in before:
        signal.signal(number, request)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
