"""A transformer that was compiled ahead of time for one image size: a ``.pt2`` package of AOTInductor.

A package holds machine code, which runs when it is loaded: **load only files that you trust**. It holds no weights; it
computes with those of the model that it is loaded for.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.models.quantize import is_fp8

if TYPE_CHECKING:
    from fewstep.models.denoiser import TransformerDenoiser

_METADATA = "_metadata.json"  # end of its name in a package, which is a ZIP archive
_OURS = "fewstep"


class TransformerGraph(nn.Module):
    """What is compiled: a denoiser's work after the text, from tensors alone."""

    def __init__(self, denoiser: TransformerDenoiser) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, x: Tensor, sigma: Tensor, text: Tensor, freqs: Tensor) -> Tensor:
        """Arguments and result as for the denoiser's ``velocity_from_text``."""
        velocity: Tensor = self.denoiser.velocity_from_text(x, sigma, text, freqs)
        return velocity


@dataclass(frozen=True)
class AheadOfTime:
    """A loaded package.

    Attributes:
        compiled: :meth:`TransformerGraph.forward` for ``batch`` samples.
        shape: of one latent.
        weights: those of the model, which the machine code reads by their addresses; they must live as long.
    """

    compiled: Callable[..., Tensor]
    batch: int
    shape: tuple[int, ...]
    weights: Mapping[str, Tensor]

    def __call__(self, x: Tensor, sigma: Tensor, text: Tensor, freqs: Tensor) -> Tensor:
        """As ``velocity_from_text``, for any number of samples: in batches, the last one filled up.

        Raises:
            UserError: latents of another size.
        """
        if tuple(x.shape[1:]) != self.shape:
            made, wanted = ("x".join(map(str, shape[-2:])) for shape in (self.shape, tuple(x.shape)))
            raise UserError(f"aot: the package is for latents of {made}, not {wanted}; take its size, or no package")
        parts = []
        for rows in zip(*(each.split(self.batch) for each in (x, sigma, text)), strict=True):
            count = len(rows[0])
            full = [torch.cat([each, each[:1].expand(self.batch - count, *each.shape[1:])]) for each in rows]
            parts.append(self.compiled(*full, freqs)[:count])
        return torch.cat(parts)


def describe(denoiser: TransformerDenoiser, batch: int, shape: tuple[int, ...]) -> dict[str, str]:
    """What a package is for, as it is kept in the package."""
    return {_OURS: json.dumps({"batch": batch, "shape": shape, **_requirements(denoiser)})}


def check_package(file: str | Path, offload: str) -> None:
    """Check a package before a model is loaded.

    Raises:
        UserError: it is no such package; or blocks are offloaded, whose weights it needs.
    """
    if offload == "group":
        raise UserError("aot: a package needs all weights in place; use offload none or model")
    _read_description(Path(file))


def load_package(file: str | Path, denoiser: TransformerDenoiser) -> AheadOfTime:
    """Load a package for a denoiser, whose weights it shares. Its machine code runs: it must be trusted.

    Raises:
        UserError: it is no such package; or it was made for another architecture, dtype, device or version of torch.
    """
    made = _read_description(Path(file))
    if is_fp8(denoiser):
        raise UserError(f"{file}: packages are for weights in bf16 or fp32, not fp8")
    for key, wanted in _requirements(denoiser).items():
        if made.get(key) != wanted:
            shown = "" if key == "architecture" else f" {made.get(key)}, not {wanted}"
            raise UserError(f"{file}: was made for another {key}{shown}; export it again: fewstep export MODEL --aot")
    from torch._inductor import aoti_load_package

    try:
        compiled = aoti_load_package(str(file))
        weights = {f"denoiser.{name}": tensor for name, tensor in denoiser.state_dict().items()}
        needed = {name: weights[name] for name in compiled.get_constant_fqns()}
        compiled.load_constants(needed, check_full_update=True, user_managed=True)
    except (RuntimeError, KeyError) as error:
        raise UserError(
            f"{file}: cannot be loaded ({(str(error).splitlines() or ['?'])[0]}); export it again"
        ) from None
    return AheadOfTime(compiled, int(made["batch"]), tuple(made["shape"]), needed)


def _requirements(denoiser: TransformerDenoiser) -> dict[str, str]:
    transformer = denoiser.transformer
    config = {key: value for key, value in transformer.config.items() if not key.startswith("_")}
    weight = next(transformer.parameters())
    return {
        "architecture": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest(),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "device": weight.device.type,
        "torch": torch.__version__,
    }


def _read_description(file: Path) -> Mapping[str, Any]:
    """Read from the archive, before anything in it runs."""
    try:
        with zipfile.ZipFile(file) as archive:
            names = [name for name in archive.namelist() if name.endswith(_METADATA)]
            found: Mapping[str, Any] = json.loads(json.loads(archive.read(names[0]))[_OURS])
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except (OSError, zipfile.BadZipFile, IndexError, KeyError, ValueError, TypeError) as error:
        raise UserError(f"{file}: not a package of fewstep export --aot, or damaged ({error})") from None
    return found
