"""`fewstep distill --ray`: a distillation by several processes of Ray Train, which restarts them after a loss."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fewstep import api
from fewstep.config.load import load_recipe
from fewstep.core.device import parse_device
from fewstep.errors import UserError

RESTARTS = 3  # of all processes together, from the last checkpoint


def distill_on_ray(
    recipe: str, out: Path | None, overrides: Sequence[str], overwrite: bool, device: str, workers: int
) -> api.DistillResult:
    """As :func:`fewstep.api.distill`, by so many processes on the cluster that ``RAY_ADDRESS`` names, or on this
    machine. The processes of a cluster must see the same files under the same paths.

    Args:
        device: "cpu", or else a GPU for each process where the cluster has so many.

    Raises:
        UserError: Ray Train is not installed, the cluster has too few CPUs or GPUs, or a process reports a mistake.
    """
    try:
        import ray
        from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
        from ray.train.torch import TorchConfig, TorchTrainer
    except ImportError:
        raise UserError("--ray: needs Ray Train; pip install 'fewstep[ray]'") from None
    parse_device(device)
    name = load_recipe(recipe, overrides).name  # a mistake is reported before Ray starts
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would report its use
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # which shows every line twice
    errors_only = ray.LoggingConfig(log_level="ERROR")  # without its dashboard Ray Train warns every second
    if "RAY_ADDRESS" in os.environ:
        ray.init(logging_config=errors_only)
    else:
        cpus = max(workers, os.cpu_count() or 1)
        ray.init("local", num_cpus=cpus, include_dashboard=False, logging_config=errors_only)
    try:
        use_gpu = _uses_gpus(ray.cluster_resources(), device, workers)
        with tempfile.TemporaryDirectory() as folder:
            work: Any = _distill  # Ray's annotation knows no value that is returned
            trainer = TorchTrainer(
                work,
                train_loop_config={
                    "folder": os.getcwd(),
                    "recipe": recipe,
                    "out": out or Path("runs") / name,
                    "overrides": list(overrides),
                    "overwrite": overwrite,
                    "device": device,
                },
                scaling_config=ScalingConfig(num_workers=workers, use_gpu=use_gpu),
                torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
                run_config=RunConfig(storage_path=folder, failure_config=FailureConfig(max_failures=RESTARTS)),
            )
            try:
                result: Any = trainer.fit()
                made: api.DistillResult = result.return_value
                return made
            except TrainingFailedError as failed:
                raise UserError(_reason(failed)) from None
    finally:
        ray.shutdown()


def _uses_gpus(there: dict[str, float], device: str, workers: int) -> bool:
    """Whether every process gets a GPU. Raises: UserError if the cluster has too few."""
    cpus, gpus = int(there.get("CPU", 0)), int(there.get("GPU", 0))
    if cpus < workers:
        raise UserError(f"--ray {workers}: the cluster has {cpus} CPUs; each process needs one")
    if device == "cpu" or (device == "auto" and gpus == 0):
        return False
    if gpus < workers:
        raise UserError(f"--ray {workers}: the cluster has {gpus} GPUs; take fewer processes, or --device cpu")
    return True


def _distill(options: dict[str, Any]) -> api.DistillResult:
    """What each process runs; Ray Train has joined them already."""
    os.chdir(options["folder"])  # relative paths are those of the command
    return api.distill(
        options["recipe"],
        options["out"],
        overrides=options["overrides"],
        overwrite=options["overwrite"],
        device=options["device"],
    )


def _reason(failed: BaseException) -> str:
    """One line: a user's mistake in one of the processes, or what Ray says."""
    failures = getattr(failed, "worker_failures", {})
    mistakes = [str(error) for error in failures.values() if isinstance(error, UserError)]
    lines = [line for line in str(failed).splitlines() if line.strip()]
    return mistakes[0] if mistakes else f"--ray: the processes failed {RESTARTS + 1} times: {lines[-1].strip()}"
