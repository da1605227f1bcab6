"""`fewstep lora extract`, `resize` and `mix`: adapters made of models and of other adapters."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fewstep.cli.lora_options import Energy, Ignore, LoraDtype, LoraDtypeName, ModelOfNames, WeightedFiles
from fewstep.cli.options import Device

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fewstep.export.lora_svd import Kept

Out = Annotated[Path, typer.Option(help="The .safetensors file to write, with diffusers' names.")]
MAX_RANK = 2**16


def extract(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The model that the other was tuned from.")],
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="The tuned model.")],
    out: Out,
    energy: Energy = 0.95,
    rank: Annotated[int, typer.Option(min=1, max=MAX_RANK, help="Largest rank of a layer.")] = 64,
    dtype: Annotated[LoraDtypeName, typer.Option(help="Data type of the written weights.")] = LoraDtypeName.bf16,
    device: Device = "auto",
) -> None:
    """Extract the difference of two models as a LoRA (SVD); ranks differ by layer."""
    import warnings

    from fewstep.cli.lora_options import check_lora_out
    from fewstep.core.device import resolve_device
    from fewstep.errors import UserError
    from fewstep.export.lora_svd import differences, truncate
    from fewstep.models.components import format_tensor_names, resolve_model
    from fewstep.models.lora.metadata import lora_metadata
    from fewstep.models.lora.targets import model_targets
    from fewstep.models.lora.weights import Update
    from fewstep.models.lora.write import write_lora
    from fewstep.progress import progress_bar

    check_lora_out(out)
    chosen = resolve_device(device)
    targets = model_targets(resolve_model(base))
    updates: dict[str, Update] = {}
    kept: dict[str, Kept] = {}
    unadapted: list[str] = []
    with progress_bar(None, "decomposing layers") as advance:
        for name, difference in differences(base, tuned, targets, unadapted):
            change, kept[name] = truncate(difference.to(chosen), energy, rank)
            updates[name] = Update(change)
            advance(1)
    if not updates:
        raise UserError(f"{tuned}: no linear layer differs from {base}: there is nothing to extract")
    if unadapted:
        names = format_tensor_names("other", unadapted)
        warnings.warn(f"not in the LoRA, which has linear layers alone: {names}", stacklevel=1)
    metadata = lora_metadata(out.stem, base_model=base, description=f"extracted: {tuned} minus {base}")
    write_lora(out, updates, targets, "diffusers", metadata, dtype.torch_dtype)
    typer.echo(_line(out, kept))


def resize(
    file: Annotated[Path, typer.Argument(help="A LoRA file in any format.")],
    out: Out,
    rank: Annotated[int, typer.Option(min=1, max=MAX_RANK, help="Largest rank of a layer.")],
    energy: Energy = 1.0,
    model: ModelOfNames = None,
    ignore: Ignore = None,
    dtype: LoraDtype = None,
    device: Device = "auto",
) -> None:
    """Reduce the rank of a LoRA (SVD), or turn a LoKr into a LoRA."""
    from fewstep.cli.lora_options import check_lora_out, open_targets
    from fewstep.core.device import resolve_device
    from fewstep.export.lora_svd import resize as resized
    from fewstep.models.lora.bind import read_lora
    from fewstep.models.lora.metadata import derived_metadata
    from fewstep.models.lora.write import write_lora
    from fewstep.progress import track

    check_lora_out(out)
    chosen = resolve_device(device)
    targets = open_targets(model)
    lora = read_lora(file, targets, ignore or [])
    names = list(lora.updates)
    results = {name: resized(lora.updates[name], energy, rank, chosen) for name in track(names, "decomposing layers")}
    updates = {name: update for name, (update, _) in results.items()}
    metadata = derived_metadata(lora.metadata, out.stem)
    write_lora(out, updates, targets, "diffusers", metadata, dtype.torch_dtype if dtype else lora.dtype)
    typer.echo(_line(out, {name: kept for name, (_, kept) in results.items()}))


def mix(
    files: WeightedFiles,
    out: Out,
    rank: Annotated[
        int | None,
        typer.Option(min=1, max=MAX_RANK, help="Of the weighted sum (SVD). [default: exact: the ranks add up]"),
    ] = None,
    model: ModelOfNames = None,
    ignore: Ignore = None,
    dtype: Annotated[LoraDtypeName, typer.Option(help="Data type of the written weights.")] = LoraDtypeName.bf16,
) -> None:
    """Make one LoRA of several: their weighted sum, exact by concatenation or at a smaller rank."""
    from fewstep.cli.lora_options import check_lora_out, open_targets
    from fewstep.errors import UserError
    from fewstep.export.lora_mix import concatenate
    from fewstep.export.lora_svd import resize as resized
    from fewstep.models.lora.merge import parse_loras, read_loras
    from fewstep.models.lora.metadata import lora_metadata
    from fewstep.models.lora.write import write_lora
    from fewstep.progress import track

    check_lora_out(out)
    weighted = parse_loras(files)
    if len(weighted) < 2:
        raise UserError("mix: give two LoRA files or more")
    targets = open_targets(model)
    loras = read_loras(weighted, targets, ignore or [])
    updates = concatenate(loras)
    line = f"{out}: {len(updates)} linear layers, exact"
    if rank is not None:
        results = {name: resized(updates[name], 1.0, rank) for name in track(list(updates), "decomposing layers")}
        updates = {name: update for name, (update, _) in results.items()}
        line = _line(out, {name: kept for name, (_, kept) in results.items()})
    sources = ", ".join(f"{lora.file.stem}:{strength:g}" for lora, strength in loras)
    write_lora(out, updates, targets, "diffusers", lora_metadata(out.stem, merged_from=sources), dtype.torch_dtype)
    typer.echo(line)


def _line(out: Path, kept: Mapping[str, Kept]) -> str:
    from fewstep.export.lora_svd import kept_energy

    ranks = sorted(each.rank for each in kept.values())
    return (
        f"{out}: {len(kept)} linear layers, ranks {ranks[0]} to {ranks[-1]}, "
        f"{100 * kept_energy(kept):.2f}% of the squared norm"
    )
