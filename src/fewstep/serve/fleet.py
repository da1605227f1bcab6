"""Several replicas of a model on Ray Serve, behind one address.

fewstep serve MODEL --replicas 2
serve run fewstep.serve.fleet:app model=MODEL replicas=2
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, model_validator

from fewstep.errors import UserError
from fewstep.models.components import BUNDLED_MODELS
from fewstep.progress import log_line
from fewstep.serve.prepare import prepare
from fewstep.serve.run import addresses, bind, keys_for
from fewstep.serve.settings import Count, Seconds, ServedModel, ServeSettings, read_settings

if TYPE_CHECKING:
    from ray.serve import Application

NAME = "fewstep"  # of the application in Ray Serve
LOGGING = {"log_level": "WARNING", "enable_access_log": False}  # of Ray Serve; the replicas log each request
OBJECT_STORE = 2**28  # bytes of memory between the processes: encoded images pass through it
GATEWAY_REQUESTS = 100_000  # at once; ``max_queue`` is the limit


class FleetSettings(ServeSettings, ServedModel):
    """A model, the limits of the service, and its replicas. Paths are those of the machines of the replicas.

    Attributes:
        max_queue: requests that wait for a replica; more are refused.
        replicas: processes with one model each.
        max_replicas: while requests wait, replicas are added up to this number; None keeps their number.
        upscale_delay, downscale_delay: seconds for which more or fewer must be wanted before their number changes.
        per_replica: requests that a replica has at once, to draw them in batches; further ones wait.
        cpus: of each replica.
        gpus: of each replica; 0.5 shares one GPU between two.
    """

    replicas: Count = 1
    max_replicas: Count | None = None
    upscale_delay: Seconds = 30.0
    downscale_delay: Seconds = 600.0
    per_replica: Count = 16
    cpus: float = Field(1.0, gt=0)
    gpus: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(f"max_replicas: {self.max_replicas} is less than replicas, {self.replicas}")
        return self

    @property
    def most(self) -> int:
        """Replicas at the most."""
        return self.max_replicas or self.replicas


def app(args: dict[str, Any]) -> Application:
    """The application as ``serve run`` and Ray Serve's configuration files take it.

    Args:
        args: of :class:`FleetSettings`, by name.

    Raises:
        UserError: an argument is unknown or wrong, or a package is missing.
    """
    return application(read_settings(FleetSettings, args))


def application(fleet: FleetSettings) -> Application:
    """The gateway and its replicas. Raises: UserError if Ray Serve is missing."""
    try:
        from ray import serve

        from fewstep.serve.gateway import Gateway
        from fewstep.serve.replica import Replica
    except ImportError as error:
        raise UserError(f"several replicas need the package {error.name}: pip install 'fewstep[fleet]'") from None
    scale: dict[str, Any] = {"num_replicas": fleet.replicas}
    if fleet.most > fleet.replicas:
        # what waits counts, so a queue adds replicas; at half of what a replica takes its batches are still full
        target = max(1, fleet.per_replica // 2)
        limits = {"min_replicas": fleet.replicas, "max_replicas": fleet.most, "target_ongoing_requests": target}
        delays = {"upscale_delay_s": fleet.upscale_delay, "downscale_delay_s": fleet.downscale_delay}
        scale = {"autoscaling_config": limits | delays}
    replicas = serve.deployment(
        max_ongoing_requests=fleet.per_replica,
        max_queued_requests=fleet.max_queue,
        graceful_shutdown_timeout_s=fleet.drain,
        ray_actor_options={"num_cpus": fleet.cpus, "num_gpus": fleet.gpus},
        **scale,
    )(Replica)
    gateway = serve.deployment(
        max_ongoing_requests=GATEWAY_REQUESTS,
        graceful_shutdown_timeout_s=fleet.drain,
        ray_actor_options={"num_cpus": 0},
    )(Gateway)
    # the queue is the one in front of the replicas: theirs holds all that they are sent
    own = fleet.model_copy(update={"max_queue": fleet.per_replica * fleet.max_images})
    return gateway.bind(replicas.bind(own), fleet.timeout)


def serve_fleet(fleet: FleetSettings, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Serve a model by several processes of this machine until Ctrl-C or SIGTERM.

    Args:
        port: 0 is a free one.

    Raises:
        UserError: as for :func:`fewstep.serve.run.serve`, or the machine has not enough CPUs or GPUs.
    """
    import torch

    cpus, gpus = os.cpu_count() or 1, 0 if fleet.device == "cpu" else torch.cuda.device_count()
    fleet = fitted(fleet, cpus, gpus).model_copy(update=absolute_paths(fleet))
    keys_for(host, fleet)
    prepare(fleet, fleet)
    served = application(fleet)
    with bind(host, port) as bound:
        port, shown = bound.getsockname()[1], addresses(Path(fleet.model).name, bound)
    from ray import serve

    ended = threading.Event()
    with local_ray(host, port, cpus, gpus):
        serve.run(served, name=NAME, logging_config=LOGGING)
        log_line(shown)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: ended.set())
        ended.wait()
        serve.delete(NAME)  # finishes the requests, which the end of Ray alone would not


@contextmanager
def local_ray(host: str, port: int, cpus: int, gpus: int) -> Iterator[None]:
    """Inside, Ray runs on this machine, with so many CPUs and GPUs to share out, and Ray Serve at an address."""
    import ray
    from ray import serve

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would report its use
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")  # a busy machine needs more than 5 seconds
    ray.init("local", num_cpus=cpus, num_gpus=gpus, include_dashboard=False, object_store_memory=OBJECT_STORE)
    try:
        serve.start(http_options={"host": host, "port": port}, logging_config=LOGGING)
        yield
    finally:
        serve.shutdown()
        ray.shutdown()


def absolute_paths(fleet: FleetSettings) -> dict[str, str]:
    """The settings that name something on this disk, for processes that run elsewhere."""
    named = {name: getattr(fleet, name) for name in ("model", "api_keys", "lora_dir", "vae", "enhancer")}
    paths = {name: Path(value).expanduser() for name, value in named.items() if value and value not in BUNDLED_MODELS}
    return {name: str(path.absolute()) for name, path in paths.items() if path.exists()}


def fitted(fleet: FleetSettings, cpus: int, gpus: int) -> FleetSettings:
    """Replicas with a GPU each where there are GPUs, and with their share of the CPUs.

    Args:
        cpus, gpus: of this machine.

    Raises:
        UserError: there are too few.
    """
    for kind, there in (("GPUs", gpus or fleet.most), ("CPUs", cpus)):
        if there < fleet.most:
            raise UserError(f"--replicas: {fleet.most} replicas need as many {kind}; there are {there}")
    return fleet.model_copy(update={"cpus": float(cpus // fleet.most), "gpus": float(gpus > 0)})
