"""`fewstep generate`: images from prompts."""

import math
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fewstep.cli.options import Precision


class Offload(StrEnum):
    none = "none"
    model = "model"
    group = "group"


def generate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A model's folder, or a shipped one's name (\"micro\").")
    ],
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT...", help="One image is made of each.")] = None,
    prompts_file: Annotated[Path | None, typer.Option(help="A text file with more prompts, one a line.")] = None,
    out: Annotated[
        Path, typer.Option("-o", "--out", help="An image file, for a grid of all; or a folder, for a file of each.")
    ] = Path("out.png"),
    seed: Annotated[int, typer.Option(min=0, help="Image i starts from seed + i.")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of the sampler. [default: the model's]")] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(min=0, help="cond + g (cond - null); 0 is none. [default: the model's]")
    ] = None,
    negative_prompt: Annotated[str, typer.Option(help="What guidance leads away from.")] = "",
    system_prompt: Annotated[
        str | None, typer.Option(help="The system's turn before every prompt. [default: the model's]")
    ] = None,
    assistant_prefix: Annotated[
        str, typer.Option(help="What the text encoder is to have thought of the prompts.")
    ] = "",
    cfg_normalization: Annotated[
        float, typer.Option(min=0, help="Longest guided velocity, over the unguided one's; 0 is no limit.")
    ] = 0.0,
    cfg_truncation: Annotated[float, typer.Option(min=0, max=1, help="No guidance where 1 - sigma is larger.")] = 1.0,
    height: Annotated[int | None, typer.Option(min=1, help="Pixels. [default: the model's]")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Pixels. [default: the model's]")] = None,
    sampler: Annotated[str | None, typer.Option(help="euler or renoise. [default: the model's]")] = None,
    eta: Annotated[
        float | None, typer.Option(min=0, max=1, help="Share of fresh noise for renoise. [default: the model's]")
    ] = None,
    columns: Annotated[int | None, typer.Option(min=1, help="Columns of the grid. [default: a square]")] = None,
    precision: Annotated[
        Precision | None,
        typer.Option(
            help="Of the weights: bf16 is as good, and half as large; fp8 is half of that. [default: their own]"
        ),
    ] = None,
    offload: Annotated[
        Offload,
        typer.Option(
            help="What waits in the CPU's memory: text encoder and autoencoder; or the transformer's blocks too."
        ),
    ] = Offload.none,
    tiling: Annotated[bool, typer.Option("--tiling", help="Decode large images in tiles: less memory.")] = False,
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile the transformer's blocks: slow first, then faster.")
    ] = False,
    attention: Annotated[
        str | None, typer.Option(help="One of diffusers' attention backends, as flash or sage. [default: native]")
    ] = None,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, ...")] = "cpu",
) -> None:
    """Generate images from prompts."""
    import sys

    from rich.console import Console
    from rich.progress import Progress

    from fewstep.data.images import grid, to_pil
    from fewstep.data.prompts import read_prompts
    from fewstep.errors import UserError
    from fewstep.inference.generate import generate as make
    from fewstep.models.pipeline import load

    texts = [*(prompts or []), *(read_prompts(prompts_file) if prompts_file else [])]
    if not texts:
        raise UserError("no prompts: give some, or --prompts-file")
    if compile and offload is Offload.group:
        raise UserError("--compile: not together with --offload group, whose weights are elsewhere at every step")
    _check_writable(out)
    pipeline = load(model, device, precision.dtype if precision else None, offload.value)
    if attention is not None:
        pipeline.set_attention_backend(attention)
    if tiling:
        pipeline.vae.enable_tiling()
    if compile:
        pipeline.denoiser.compile_repeated_blocks()
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("images", total=len(texts))
        made = make(
            pipeline,
            texts,
            seed=seed,
            steps=steps,
            guidance_scale=guidance_scale,
            negative_prompt=negative_prompt,
            system_prompt=system_prompt,
            assistant_prefix=assistant_prefix,
            cfg_normalization=cfg_normalization,
            cfg_truncation=cfg_truncation,
            height=height,
            width=width,
            sampler=sampler,
            eta=eta,
            progress=lambda count: progress.advance(task, count),
        )
    if out.suffix:
        grid(made.images, columns or math.ceil(math.sqrt(len(texts)))).save(out)
    else:
        for index, image in enumerate(made.images):
            to_pil(image).save(out / f"{index:04d}.png")
    each = made.seconds / len(texts)
    typer.echo(f"{out}: {len(texts)} images, {made.nfe} forwards and {each:.3f} s each")


def _check_writable(out: Path) -> None:
    """Before minutes are spent on images for it. Raises: UserError."""
    from PIL import Image

    from fewstep.errors import UserError

    if out.suffix and out.suffix.lower() not in Image.registered_extensions():
        raise UserError(f"{out}: {out.suffix} is no kind of image; use .png, or a folder")
    folder = out.parent if out.suffix else out
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot write here ({error.strerror})") from None
