"""What a training remembers over its checkpoints: the best value of a metric, counters, means."""

from pathlib import Path

import pytest
from tiny import fit, tiny_trainer

from fewstep.training import checkpoint
from fewstep.training.best import Best
from fewstep.training.trainer import Trainer


@pytest.mark.parametrize(("mode", "best"), [("max", 6), ("min", 3)])
def test_best_checkpoint_is_kept_and_loads(tmp_path: Path, mode: str, best: int) -> None:
    """The metric is best at step 6 (or 3), which the newest two, 11 and 12, would have replaced."""
    values = dict(zip(range(1, 13), [5, 4, 1, 8, 5, 9, 9, 2, 3, 4, 5, 6], strict=True))
    settings = {"save_every": 1, "max_checkpoints": 2, "keep_best": {"metric": "val/name", "mode": mode}}

    def trainer(steps: int) -> Trainer:
        made = tiny_trainer(tmp_path, steps=steps, **settings)
        made.validate, made.validate_every = lambda: {"val/name": float(values[made.step])}, 1
        return made

    fit(trainer(7))
    ended = fit(trainer(12))  # the checkpoint holds the best so far
    kept = [int(path.name[5:]) for path in checkpoint.list_checkpoints(ended.run.checkpoints)]
    assert kept == [best, 11, 12]
    assert ended.best == Best(ended.train.keep_best, best, values[best])
    assert fit(trainer(12)).best == ended.best  # finished: nothing is trained
    expected = checkpoint.load(checkpoint.list_checkpoints(ended.run.checkpoints)[0]).read("first.ema")
    assert ended.load_best()
    assert ended.step == best
    with ended.ema_weights():
        for name, weight in ended.train_states[0].weights.items():
            assert weight.equal(expected[name])


def test_state_has_the_same_types_and_values_after_a_resume(tmp_path: Path) -> None:
    """What is no tensor goes through JSON, which has no tuples."""

    def values(trainer: Trainer) -> dict[str, object]:
        return {
            "step": trainer.step,
            "position": trainer.position,
            "seconds": trainer.seconds,
            "means": trainer._means.state(),
            "counters": {state.name: state.counters for state in trainer.train_states},
            "best": trainer.best,
        }

    settings = {"save_every": 1, "log_every": 3, "keep_best": {"metric": "steps"}}
    first = fit(tiny_trainer(tmp_path, steps=8, **settings))
    second = fit(tiny_trainer(tmp_path, steps=8, **settings))
    assert first.best is not None
    for name, value in values(first).items():
        restored = values(second)[name]
        assert restored == value, name
        assert repr(restored) == repr(value), name


def test_another_metric_of_a_resumed_run_has_a_best_of_its_own(tmp_path: Path) -> None:
    """The best value of one metric means nothing for another: "steps" counts up, far above a loss."""
    fit(tiny_trainer(tmp_path, steps=4, log_every=1, keep_best={"metric": "steps", "mode": "max"}))
    changed = {"metric": "second/loss", "mode": "max"}
    resumed = fit(tiny_trainer(tmp_path, steps=6, log_every=1, keep_best=changed))
    assert resumed.best is not None
    assert resumed.best.settings.metric == "second/loss"
    assert resumed.best.step in (5, 6)
    other_mode = fit(tiny_trainer(tmp_path, steps=8, log_every=1, keep_best=changed | {"mode": "min"}))
    assert other_mode.best is not None
    assert (other_mode.best.settings.mode, other_mode.best.step > 6) == ("min", True)
    assert fit(tiny_trainer(tmp_path, steps=9, log_every=1)).best is None


def test_last_step_is_not_loaded_again_if_it_is_the_best(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, keep_best={"metric": "steps"})  # counts up
    fit(trainer)
    assert trainer.best is not None
    assert not trainer.load_best()
