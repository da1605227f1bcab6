"""Run the server until it is told to stop."""

from __future__ import annotations

import signal
import socket

from fewstep.errors import UserError
from fewstep.machine import reason
from fewstep.progress import log_line
from fewstep.serve.logs import log_to_stderr
from fewstep.serve.prepare import prepare
from fewstep.serve.settings import ApiKeys, ServedModel, ServeSettings, client_keys, is_loopback


def serve(served: ServedModel, settings: ServeSettings, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Serve a model by HTTP until Ctrl-C or SIGTERM; requests in progress are finished first.

    Args:
        port: 0 is a free one.

    Raises:
        UserError: a package is missing, the address cannot be used, or the model, keys or LoRA files cannot be read.
    """
    try:
        import uvicorn

        from fewstep.serve.app import make_app
    except ImportError as error:
        raise UserError(f"serving needs the package {error.name}: pip install 'fewstep[serve]'") from None
    keys = keys_for(host, settings)
    load_service = prepare(served, settings)
    with bind(host, port) as bound:
        service = load_service()
        log_to_stderr()
        config = uvicorn.Config(
            make_app(service, keys),
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=round(settings.drain),
        )
        log_line(addresses(service.name, bound))
        before = signal.signal(signal.SIGTERM, lambda number, frame: None)  # uvicorn raises it again after its end
        try:
            uvicorn.Server(config).run(sockets=[bound])
        finally:
            signal.signal(signal.SIGTERM, before)


def keys_for(host: str, settings: ServeSettings) -> ApiKeys:
    """The clients' keys. Raises: UserError where other machines reach the address and there are none."""
    keys = client_keys(settings.api_keys)
    if not keys.required and not is_loopback(host):
        raise UserError(f"--host {host}: other machines reach this address; give --api-keys FILE as well")
    return keys


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens at the address. Raises: UserError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        bound.close()
        raise UserError(f"--host {host} --port {port}: cannot be used ({reason(error)})") from None
    return bound


def addresses(name: str, bound: socket.socket) -> str:
    """Where the page and the API of a model are."""
    host, port = bound.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    return f"serving {name}: http://{shown}:{port}/ (page), http://{shown}:{port}/v1 (OpenAI's API)"
