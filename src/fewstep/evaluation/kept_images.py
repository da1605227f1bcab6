"""Images that evaluations have made: of an unfinished one in its report's folder, and of a model in the model's folder.

    <report>/.images/<setting>.safetensors   images, uint8 [N, H, W, 3]; what they depend on, NFE and time as metadata
    <report>/.images/prompts.json            how many prompts fit into the time limit
    <model>/images/<setting>.safetensors     images of the model's own number of steps, published with it

The same evaluation continues from those in its report's folder, which are deleted when the report is written.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from fewstep.atomic import write_tensors, write_text
from fewstep.data.trajectories import template_hash
from fewstep.inference.generate import GenerationResult
from fewstep.machine import writing
from fewstep.models.pipeline import TextToImagePipeline

KEPT, PUBLISHED, COUNT = ".images", "images", "prompts.json"
#: Settings that published images are older than: left out of fingerprints where they have no effect.
_NEWER = ("frames", "step_counts", "step_loras")


def model_fingerprint(model: TextToImagePipeline) -> str:
    """A hash of what a model's images depend on, but for rounding: all weights as they are, settings, template."""
    total = hashlib.blake2b(digest_size=16)
    config = model.generation_config
    unsaid = {name for name in _NEWER if getattr(config, name) == type(config).model_fields[name].default}
    settings = (config.model_dump_json(exclude=unsaid), model.shift, template_hash(model.encoder))
    total.update(str(settings).encode())
    for name, module in model.components.items():
        if isinstance(module, nn.Module):
            for key, tensor in sorted(module.state_dict().items()):
                total.update(f"{name}.{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
                total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


class Fingerprints:
    """Fingerprints of the models of one evaluation, each computed when it is first needed, and once."""

    def __init__(self) -> None:
        self._found: dict[int, str] = {}

    def __call__(self, model: TextToImagePipeline) -> str:
        if id(model) not in self._found:
            self._found[id(model)] = model_fingerprint(model)
        return self._found[id(model)]


class KeptImages:
    """
    Args:
        folder: None keeps nothing.
        fingerprint: of a model.
    """

    def __init__(self, folder: Path | None, fingerprint: Callable[[TextToImagePipeline], str] | None = None) -> None:
        self.folder, self.fingerprint = folder, fingerprint or Fingerprints()

    def made_by(self, model: TextToImagePipeline, **settings: Any) -> dict[str, Any]:
        """What images depend on, as JSON values; empty where nothing is kept."""
        if self.folder is None:
            return {}
        return {"model": self.fingerprint(model), **settings}

    def load(self, name: str, made_by: Mapping[str, Any]) -> GenerationResult | None:
        """Images that were saved with an equal ``made_by``; None where there are none, or they cannot be read."""
        if self.folder is None:
            return None
        try:
            with safe_open(self.folder / f"{name}.safetensors", "pt") as file:
                saved = file.metadata()
                if json.loads(saved["made_by"]) == json.loads(json.dumps(made_by)):
                    return GenerationResult(file.get_tensor("images"), int(saved["nfe"]), float(saved["seconds"]))
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            pass
        return None

    def save(self, name: str, made_by: Mapping[str, Any], result: GenerationResult) -> None:
        """Raises: UserError if it cannot be written."""
        if self.folder is not None:
            metadata = {"made_by": json.dumps(made_by), "nfe": str(result.nfe), "seconds": str(result.seconds)}
            write_tensors(self.folder / f"{name}.safetensors", {"images": result.images}, metadata)

    def load_count(self, made_by: Mapping[str, Any]) -> int | None:
        """The number of prompts that was saved with an equal ``made_by``, else None."""
        if self.folder is None:
            return None
        try:
            found = json.loads((self.folder / COUNT).read_text(encoding="utf-8"))
            return int(found["count"]) if found["made_by"] == json.loads(json.dumps(made_by)) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def save_count(self, made_by: Mapping[str, Any], count: int) -> None:
        """Raises: UserError if it cannot be written."""
        if self.folder is not None:
            write_text(self.folder / COUNT, json.dumps({"made_by": made_by, "count": count}))

    def delete(self) -> None:
        """Raises: UserError if a file cannot be deleted."""
        if self.folder is not None and self.folder.exists():
            with writing(self.folder):
                shutil.rmtree(self.folder)
