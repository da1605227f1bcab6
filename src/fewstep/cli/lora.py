"""`fewstep lora`: training; LoRA files of all programs: checked, described, merged, converted."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fewstep.cli.lora_choose import choose
from fewstep.cli.lora_edit import extract, mix, resize
from fewstep.cli.lora_import import import_config
from fewstep.cli.lora_options import Ignore, LoraDtype, LoraFormatName, ModelOfNames, WeightedFile, WeightedFiles
from fewstep.cli.lora_prepare import prepare
from fewstep.cli.lora_train import adapter, train
from fewstep.cli.options import Device, Model

app = typer.Typer(
    help="LoRA: training sets, training; files of all programs, merged, converted, mixed.", no_args_is_help=True
)


@app.command()
def check(
    model: Model,
    file: WeightedFile,
    prompt: Annotated[str, typer.Option(help="What is drawn with and without it.")] = "a photo of a person",
    out: Annotated[Path | None, typer.Option(help="Image file for both pictures, without it on the left.")] = None,
    ignore: Ignore = None,
    device: Device = "auto",
) -> None:
    """Draw an image with and without a LoRA; fails if a key binds nothing, or if the images are identical."""
    from fewstep.data.images import grid
    from fewstep.errors import UserError
    from fewstep.inference.lora_check import draw_with_and_without
    from fewstep.models.lora.merge import parse_lora
    from fewstep.outputs import check_image, write_image

    if out is not None:
        check_image(out)
    name, strength = parse_lora(file)
    images = draw_with_and_without(model, name, strength, prompt, ignore or [], device)
    if out is not None:
        write_image(grid(images, columns=2), out)
    difference = (images[0].float() - images[1].float()).abs()
    if not difference.any():
        raise UserError(f"{name}: changes nothing: the images with and without it are identical")
    typer.echo(
        f"{name}: changes the image: {difference.mean():.2f} of 255 levels on average, {int(difference.max())} at most"
    )


@app.command()
def info(
    file: Annotated[Path, typer.Argument(help="A LoRA file, or a folder that peft or diffusers wrote.")],
    model: ModelOfNames = None,
    ignore: Ignore = None,
) -> None:
    """Print rank, scale, targets, norms by block, and what it was trained on."""
    from rich.console import Console
    from rich.table import Table

    from fewstep.cli.lora_options import open_targets
    from fewstep.models.lora import summary
    from fewstep.models.lora.bind import read_lora

    lora = read_lora(file, open_targets(model), ignore or [])
    console = Console(soft_wrap=True, highlight=False)
    dtype = str(lora.dtype).removeprefix("torch.")
    console.print(
        f"{lora.file}: {', '.join(summary.kinds(lora))}, {lora.modules} modules, {len(lora.updates)} linear layers, "
        f"{dtype}, {lora.file.stat().st_size / 1e6:.1f} MB",
        markup=False,
    )
    console.print(f"rank: {_range(lora.ranks)}; alpha / rank: {_range(summary.scales(lora))}")
    console.print("targets: " + ", ".join(f"{name} ({count})" for name, count in summary.targets(lora).items()))
    table = Table("block", "norm of the update")
    for block, norm in summary.block_norms(lora).items():
        table.add_row(block, f"{norm:.4g}")
    console.print(table)
    for key, value in summary.header(lora):
        console.print(f"{key}: {value}", markup=False)


@app.command()
def merge(
    model: Model,
    files: WeightedFiles,
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    ignore: Ignore = None,
) -> None:
    """Write a model with LoRA files merged into its weights, which keep their dtype."""
    from fewstep.locks import exclusive
    from fewstep.models.components import resolve_model
    from fewstep.models.lora.merge import parse_loras
    from fewstep.models.pipeline import load
    from fewstep.models.replaceable import check_replaceable
    from fewstep.models.step_adapters import check_one_transformer

    check_replaceable(out)
    check_one_transformer(resolve_model(model), "merge")
    loras = parse_loras(files)
    out.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(out):
        typer.echo(load(model, "cpu", loras=loras, ignore=ignore or []).save(out))


@app.command()
def convert(
    file: Annotated[Path, typer.Argument(help="A LoRA file in any format, or a folder of peft or diffusers.")],
    out: Annotated[Path, typer.Option(help="The .safetensors file to write; a folder for peft.")],
    to: Annotated[LoraFormatName, typer.Option(help="Whose names the tensors are given.")],
    model: ModelOfNames = None,
    ignore: Ignore = None,
    dtype: LoraDtype = None,
) -> None:
    """Write a LoRA with the tensor names of another program."""
    from fewstep.cli.lora_options import check_lora_out, open_targets
    from fewstep.models.lora.bind import read_lora
    from fewstep.models.lora.metadata import derived_metadata
    from fewstep.models.lora.write import write_lora

    check_lora_out(out, to)
    targets = open_targets(model)
    lora = read_lora(file, targets, ignore or [])
    metadata = derived_metadata(lora.metadata, out.stem)
    write_lora(out, lora.updates, targets, to.value, metadata, dtype.torch_dtype if dtype else lora.dtype)
    typer.echo(f"{out}: {lora.modules} modules, {len(lora.updates)} linear layers")


def _range(values: list[int] | list[float]) -> str:
    if not values:
        return "none"
    return f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"


app.command()(prepare)
app.command()(train)
app.command()(adapter)
app.command()(choose)
app.command("import")(import_config)
app.command()(extract)
app.command()(resize)
app.command()(mix)
