"""`fewstep generate`: images from prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fewstep.cli.lora_options import Ignore
from fewstep.cli.options import Column, Device, Dtype, Overwrite, argument_text, parse_steps, was_given

if TYPE_CHECKING:
    from fewstep.inference.generate import Callback, GeneratedBatch, GenerationStep
    from fewstep.inference.params import SamplingParams
    from fewstep.models.pipeline import TextToImagePipeline


class Offload(StrEnum):
    """What stays in the CPU's memory while it is not in use."""

    none = "none"
    model = "model"
    group = "group"


def generate(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="As for the other commands. [default with --from: its own]")
    ] = None,
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT...", help="One image for each.")] = None,
    prompts_file: Annotated[
        str | None,
        typer.Option(help="Further prompts: a .txt (one a line), .jsonl, .json, .csv, ... file, or a folder."),
    ] = None,
    column: Column = "prompt",
    source: Annotated[
        str | None,
        typer.Option(
            "--from", metavar="IMAGE", help="Make this image of fewstep's again; options given here replace its own."
        ),
    ] = None,
    image: Annotated[str | None, typer.Option(metavar="FILE", help="Begin from this image, for every prompt.")] = None,
    strength: Annotated[
        float | None,
        typer.Option(help="With --image: share of the steps that are sampled, up to 1. [default: 0.8]"),
    ] = None,
    mask: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="With --image: draw only its transparent pixels, or, without transparency, light ones."
        ),
    ] = None,
    edit: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="Change this image as the prompts say, with Z-Image-Omni; may be repeated."),
    ] = None,
    enhance: Annotated[
        bool, typer.Option("--enhance", help="Let a language model revise the prompts; they are shown and recorded.")
    ] = False,
    enhancer: Annotated[
        str,
        typer.Option(
            metavar="own|FOLDER|URL#MODEL",
            help="With --enhance: the model's own text encoder, another causal language model, or an OpenAI endpoint.",
        ),
    ] = "own",
    out: Annotated[
        str,
        typer.Option(
            "-o", "--out", help="File for a grid of all (videos move in a .webp), or folder for one file each."
        ),
    ] = "out.png",
    seed: Annotated[int, typer.Option(help="Image i starts from seed + i.")] = 0,
    steps: Annotated[
        str | None,
        typer.Option(
            metavar="N|auto", help="Sampling steps; auto: as many as each prompt needs. [default: the model's]"
        ),
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(min=0, help="g in cond + g (cond - null); 0 is none. [default: the model's]")
    ] = None,
    negative_prompt: Annotated[str, typer.Option(help="Negative prompt for classifier-free guidance.")] = "",
    system_prompt: Annotated[
        str | None, typer.Option(help="System prompt before every prompt. [default: the model's]")
    ] = None,
    assistant_prefix: Annotated[str, typer.Option(help="Text placed inside <think>...</think> after the prompt.")] = "",
    cfg_normalization: Annotated[
        float, typer.Option(min=0, help="Bound of the guided velocity's norm over the unguided one's; 0 is none.")
    ] = 0.0,
    cfg_truncation: Annotated[float, typer.Option(min=0, max=1, help="No guidance where 1 - sigma is larger.")] = 1.0,
    height: Annotated[int | None, typer.Option(min=1, help="Pixels. [default: the model's]")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Pixels. [default: the model's]")] = None,
    frames: Annotated[
        int | None, typer.Option(min=1, help="Frames of a video, for models of videos. [default: the model's]")
    ] = None,
    sampler: Annotated[str | None, typer.Option(help="euler or sde. [default: the model's]")] = None,
    eta: Annotated[
        float | None, typer.Option(min=0, max=1, help="Share of fresh noise in sde steps. [default: the model's]")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images sampled together. [default: two million pixels]")
    ] = None,
    cache: Annotated[
        str | None,
        typer.Option(
            metavar="METHOD[:VALUE]",
            help="Reuse layers between steps: first-block[:0.1], interval[:2] or taylor[:2]. [default: none]",
        ),
    ] = None,
    columns: Annotated[
        int | None, typer.Option(min=1, help="Columns of the grid, for an image file. [default: a square]")
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE[:STRENGTH]", help="LoRA file, or folder of peft or diffusers; may be repeated."),
    ] = None,
    ignore: Ignore = None,
    vae: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Another VAE for the same latents. [default: the model's]")
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Data type of the weights: fp32, bf16 or fp8. [default: as stored]")
    ] = None,
    offload: Annotated[
        Offload,
        typer.Option(help="Keep in CPU memory what is not in use: text encoder and VAE (model), or also each block."),
    ] = Offload.none,
    vae_tiling: Annotated[
        bool, typer.Option("--vae-tiling", help="Decode large images in tiles, which needs less memory.")
    ] = False,
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile the transformer's blocks: a slow start, then faster steps.")
    ] = False,
    aot: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Package of export --aot. It runs as code: take only files that you trust."),
    ] = None,
    attention_backend: Annotated[
        str | None, typer.Option(help="diffusers' attention backend, such as flash or sage. [default: native]")
    ] = None,
    overwrite: Overwrite = False,
    device: Device = "auto",
) -> None:
    """Generate images from prompts. The same command again continues an interrupted one."""
    from fewstep.cli.edit_by_instruction import open_editor, open_images
    from fewstep.cli.enhance_prompts import enhance_prompts
    from fewstep.cli.image_target import Target
    from fewstep.cli.input_files import InputFiles
    from fewstep.data.prompt_files import read_prompts
    from fewstep.data.prompt_text import clean_prompt
    from fewstep.errors import UserError
    from fewstep.inference.editing import STRENGTH, encode_edits
    from fewstep.inference.generate import generate_batches
    from fewstep.inference.image_metadata import read_metadata
    from fewstep.inference.instruction import edit_batches
    from fewstep.inference.params import parse_params
    from fewstep.models.attention_backends import check_attention_backend
    from fewstep.models.components import resolve_model
    from fewstep.models.lora.merge import parse_loras
    from fewstep.models.pipeline import load

    if attention_backend is not None:
        check_attention_backend(attention_backend)
    typed = [clean_prompt(argument_text(prompt)) for prompt in prompts or []]
    texts = [*typed, *(read_prompts(prompts_file, column) if prompts_file else [])]
    options: dict[str, Any] = {
        "seed": seed,
        "steps": parse_steps(steps),
        "guidance_scale": guidance_scale,
        "negative_prompt": negative_prompt,
        "system_prompt": system_prompt,
        "assistant_prefix": assistant_prefix,
        "cfg_normalization": cfg_normalization,
        "cfg_truncation": cfg_truncation,
        "height": height,
        "width": width,
        "frames": frames,
        "sampler": sampler,
        "eta": eta,
        "batch_size": batch_size,
        "strength": strength,
        "cache": cache,
    }
    originals = texts
    files = InputFiles(parse_loras(lora or []), ignore or [], vae, image, mask, edit or [])
    if source is not None:
        made = read_metadata(source)
        given = {name: value for name, value in options.items() if was_given(context, name)}
        originals = texts or [made.extras.original_prompt or made.prompt]
        texts, options = texts or [made.prompt], made.params.model_dump() | given
        dtype = dtype or (Dtype(made.dtype) if made.dtype else None)
        model = model or made.model
        made.check_model(resolve_model(model))
        files = files.or_recorded(made, source)
    if model is None:
        context.fail("Missing argument 'MODEL'.")
    if not texts:
        raise UserError("no prompts: give some, or --prompts-file")
    params, name = parse_params(options), model
    references, params = open_images(context, name, files.references, params) if files.references else ([], params)
    edited = files.edit_input(params.strength, (params.width, params.height))
    if edited is not None:
        height, width = edited.image.shape[1:]
        update = {"width": width, "height": height, "strength": params.strength or STRENGTH}
        update["frames"] = params.frames or 1
        params = params.model_copy(update=update)

    def batches(missing: Sequence[str], params: SamplingParams, callback: Callback) -> Iterator[GeneratedBatch]:
        torch_dtype = dtype.torch_dtype if dtype else None
        if references:
            editor = open_editor(name, files, device, torch_dtype, attention_backend, vae_tiling)
            return edit_batches(editor, missing, references, params, callback)
        pipeline = load(name, device, torch_dtype, offload.value, files.loras, files.ignored, files.vae, aot)
        _speed_options(pipeline, attention_backend, vae_tiling, compile)
        begin = None if edited is None else encode_edits(pipeline, [edited]).repeat(len(missing))
        return generate_batches(pipeline, missing, params, callback, begin)

    target_options = (params, name, dtype, columns, overwrite, files.extras())
    if enhance:
        Target(out, texts, *target_options)  # its checks come before the language model's work
        texts = enhance_prompts(texts, enhancer, resolve_model(name), device, params.system_prompt)
    with Target(out, texts, *target_options, originals).claimed() as target:
        if target.missing:
            with _step_bar(len(target.missing)) as callback:
                target.fill(batches(*target.remaining(), callback))
        typer.echo(target.finish())


def _speed_options(
    pipeline: TextToImagePipeline, attention_backend: str | None, vae_tiling: bool, compile: bool
) -> None:
    if attention_backend is not None:
        pipeline.set_attention_backend(attention_backend)
    if vae_tiling:
        pipeline.vae.enable_tiling()
    if compile:
        pipeline.denoiser.compile_repeated_blocks()


@contextmanager
def _step_bar(count: int) -> Iterator[Callback]:
    """A callback that shows the images at work, their step, images per second and the time left, in a terminal."""
    from time import monotonic

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
    with Progress(*columns, TextColumn("left"), console=console, disable=not console.is_terminal) as progress:
        task, start = progress.add_task(f"image 1 of {count}", total=None, rate=""), monotonic()
        finished = 0

        def show(step: GenerationStep) -> None:
            nonlocal finished
            done = finished + len(step.images) * step.step / step.steps
            first, last = finished + 1, finished + len(step.images)
            finished += step.finished
            which = f"image {first}" if first == last else f"images {first}-{last}"
            progress.update(
                task,
                description=f"{which} of {count}, step {step.step}/{step.steps}",
                completed=done,
                total=count,
                rate=f"{done / max(monotonic() - start, 1e-3):.2f} images/s",
            )

        yield show
