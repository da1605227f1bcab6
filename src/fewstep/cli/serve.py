"""`fewstep serve`: a model behind OpenAI's image API and a web page."""

from __future__ import annotations

from typing import Annotated

import typer

from fewstep.cli.options import Device, Dtype, Model


def serve(
    model: Model,
    host: Annotated[
        str, typer.Option(help="Address to listen at. One that other machines reach needs --api-keys.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0 is a free one.")] = 8000,
    api_keys: Annotated[
        str | None, typer.Option(metavar="FILE", help="File of API keys, one on each line, after a name if you like.")
    ] = None,
    lora_dir: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="LoRA files that requests may name, with a strength for each.")
    ] = None,
    vae: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Another VAE for the same latents. [default: the model's]")
    ] = None,
    enhancer: Annotated[
        str | None,
        typer.Option(
            metavar="own|FOLDER|URL#MODEL",
            help="Revises prompts where a request wants it: the text encoder, a causal language model, or an endpoint.",
        ),
    ] = None,
    safety_filter: Annotated[
        float | None,
        typer.Option(min=0, max=1, metavar="THRESHOLD", help="Withhold images that Open-NSFW scores so high; try 0.8."),
    ] = None,
    max_queue: Annotated[int, typer.Option(min=1, help="Images that wait; more are refused with status 429.")] = 64,
    max_batch: Annotated[
        int | None, typer.Option(min=1, help="Images drawn together. [default: two million pixels]")
    ] = None,
    max_pixels: Annotated[
        int | None, typer.Option(min=1, help="Largest image, in pixels. [default: four times the model's size]")
    ] = None,
    max_steps: Annotated[int, typer.Option(min=1, help="Most sampling steps of a request.")] = 100,
    timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds for a request, its time in the queue included.")
    ] = 300,
    replicas: Annotated[
        int | None,
        typer.Option(min=1, help="Processes with one model each, on Ray Serve. [default: this process alone]"),
    ] = None,
    max_replicas: Annotated[
        int | None, typer.Option(min=1, help="Add replicas up to this number while requests wait.")
    ] = None,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Write prompts into the log.")] = False,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Data type of the weights: fp32, bf16 or fp8. [default: as stored]")
    ] = None,
    device: Device = "auto",
) -> None:
    """Serve a model: OpenAI's image API and a web page. SIGTERM or Ctrl-C ends it after the requests in progress."""
    from fewstep.serve.settings import ServedModel, ServeSettings, read_settings

    served = {
        "model": model,
        "device": device,
        "dtype": dtype.value if dtype else None,
        "lora_dir": lora_dir,
        "vae": vae,
        "enhancer": enhancer,
        "safety_filter": safety_filter,
    }
    settings = {
        "api_keys": api_keys,
        "max_queue": max_queue,
        "max_batch": max_batch,
        "max_pixels": max_pixels,
        "max_steps": max_steps,
        "timeout": timeout,
        "log_prompts": log_prompts,
    }
    if replicas is None and max_replicas is None:
        from fewstep.serve.run import serve as run

        run(read_settings(ServedModel, served), read_settings(ServeSettings, settings), host, port)
    else:
        from fewstep.serve.fleet import FleetSettings, serve_fleet

        scale = {"replicas": replicas or 1, "max_replicas": max_replicas}
        serve_fleet(read_settings(FleetSettings, served | settings | scale), host, port)
