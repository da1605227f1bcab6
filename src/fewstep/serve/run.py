"""Run the server until it is told to stop."""

from __future__ import annotations

import logging
import signal
import socket
import sys
from pathlib import Path

import torch

from fewstep.core.device import AUTO, resolve_device
from fewstep.errors import UserError
from fewstep.inference.enhancer import OWN, enhancer_for, open_answers
from fewstep.inference.image_extras import Extras, UsedFile
from fewstep.machine import reason
from fewstep.models.components import BUNDLED_MODELS, resolve_model
from fewstep.models.fingerprint import model_fingerprint
from fewstep.models.language_model import check_language_head, text_encoder_with_head
from fewstep.models.lora.targets import model_targets
from fewstep.models.other_vae import vae_folder
from fewstep.models.pipeline import load
from fewstep.progress import log_line
from fewstep.serve.loras import LoraFolder
from fewstep.serve.settings import ApiKeys, ServeSettings, is_loopback, read_api_keys


def serve(
    model: str | Path,
    settings: ServeSettings | None = None,
    api_keys: str | Path | None = None,
    device: str = AUTO,
    dtype: str | None = None,
    lora_dir: str | Path | None = None,
    vae: str | None = None,
    enhancer: str | None = None,
    safety_threshold: float | None = None,
) -> None:
    """Serve a model by HTTP until Ctrl-C or SIGTERM; requests in progress are finished first.

    Args:
        model: a folder in diffusers' layout, a Hugging Face hub id, or a bundled model's name.
        api_keys: file of :func:`fewstep.serve.settings.read_api_keys`; needed where other machines reach the server.
        dtype: of the weights: fp32, bf16 or fp8; None is the stored one.
        lora_dir: folder of the LoRA files that requests may name; not with fp8.
        vae: folder of an autoencoder in place of the model's own.
        enhancer: language model that revises prompts: "own" is the text encoder; else a folder, or "URL#MODEL".
        safety_threshold: images that the safety filter scores so high are withheld; None has no filter.

    Raises:
        UserError: a package is missing, the address cannot be used, or the model, keys or LoRA files cannot be read.
    """
    try:
        import uvicorn

        from fewstep.serve.app import make_app
        from fewstep.serve.safety import SafetyFilter
        from fewstep.serve.service import Service
    except ImportError as error:
        raise UserError(f"serving needs the package {error.name}: pip install 'fewstep[serve]'") from None
    settings = settings or ServeSettings()
    keys = read_api_keys(api_keys) if api_keys is not None else ApiKeys({})
    if not keys.required and not is_loopback(settings.host):
        raise UserError(f"--host {settings.host}: other machines reach this address; give --api-keys FILE as well")
    if lora_dir is not None and dtype == "fp8":
        raise UserError("--lora-dir: LoRA files cannot be changed in weights in fp8; give --dtype bf16")
    folder = resolve_model(model)
    loras = None if lora_dir is None else LoraFolder(lora_dir, model_targets(folder))
    extras = Extras(vae=None if vae is None else _named_vae(vae))
    safety_filter = None if safety_threshold is None else SafetyFilter(safety_threshold)
    answers = None
    if enhancer == OWN:
        check_language_head(folder)
    elif enhancer is not None:
        answers = open_answers(enhancer, resolve_device(device))
    with _bind(settings) as bound:
        pipeline = load(folder, device, _torch_dtype(dtype), vae=vae)
        name = str(model) if str(model) in BUNDLED_MODELS else folder.resolve().name
        if enhancer == OWN:
            answers = text_encoder_with_head(folder, pipeline.text_encoder, pipeline.tokenizer)
        revises = None if answers is None else enhancer_for(folder, answers)
        service = Service(
            pipeline, name, model_fingerprint(folder), settings, dtype, loras, revises, safety_filter, extras
        )
        _log_to_stderr()
        config = uvicorn.Config(
            make_app(service, keys),
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=round(settings.drain),
        )
        host, port = bound.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        log_line(f"serving {name}: http://{shown}:{port}/ (page), http://{shown}:{port}/v1 (OpenAI's API)")
        before = signal.signal(signal.SIGTERM, lambda number, frame: None)  # uvicorn raises it again after its end
        try:
            uvicorn.Server(config).run(sockets=[bound])
        finally:
            signal.signal(signal.SIGTERM, before)


def _named_vae(vae: str) -> UsedFile:
    """For the images' files, without the path, which is not the clients' business. Raises: UserError."""
    folder = vae_folder(vae)
    return UsedFile.of(str(folder)).model_copy(update={"path": folder.name})


def _bind(settings: ServeSettings) -> socket.socket:
    """A socket that listens at the address. Raises: UserError."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    bound = socket.socket(family)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((settings.host, settings.port))
    except (OSError, OverflowError) as error:
        bound.close()
        raise UserError(f"--host {settings.host} --port {settings.port}: cannot be used ({reason(error)})") from None
    return bound


def _torch_dtype(name: str | None) -> torch.dtype | None:
    names = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "fp16": torch.float16}
    return None if name is None else names[name]


def _log_to_stderr() -> None:
    """One line for each record, as the records of this server are: JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter('{"time": "%(asctime)s", "level": "%(levelname)s", "record": %(message)s}'))
    logger = logging.getLogger("fewstep.serve")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)
