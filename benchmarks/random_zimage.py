"""Z-Image's folder at full size with random weights: everything of it but what it has learned.

    python benchmarks/random_zimage.py runs/zimage-random        # 20.5 GB in bf16; any command takes it as a model

Loading, memory, speed and formats do not depend on what weights say, so where the real ones cannot be had these show
that a command works on 6.15e9 parameters. The tokenizer is the micro model's. Weights are written a shard at a time.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import AutoencoderKL, ZImageTransformer2DModel
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3Model

import fewstep
from fewstep.models.components import BUNDLED_MODELS

CONFIGS = Path(fewstep.__file__).parent / "assets" / "zimage"
FILES = {"transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
SHARD = 4e9  # bytes, about


def parts() -> dict[str, nn.Module]:
    """The models, on the meta device."""
    configs = {part: json.loads((CONFIGS / part / "config.json").read_text(encoding="utf-8")) for part in FILES}
    with torch.device("meta"):
        return {
            "transformer": ZImageTransformer2DModel.from_config(configs["transformer"]),
            "vae": AutoencoderKL.from_config(configs["vae"]),
            "text_encoder": Qwen3Model(Qwen3Config(**configs["text_encoder"])),
        }


def weight(name: str, like: Tensor, generator: torch.Generator) -> Tensor:
    """Matrices and kernels that keep a signal's size, norms of 1, offsets of 0, small pad tokens."""
    if like.ndim == 1:
        return torch.full(like.shape, 1.0 if name.endswith("weight") else 0.0, dtype=torch.bfloat16)
    drawn = torch.empty(like.shape, dtype=torch.bfloat16).normal_(generator=generator)
    return drawn.mul_(1 / math.sqrt(like[0].numel()))


def shards(model: nn.Module, seed: int) -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    shard: dict[str, Tensor] = {}
    for name, like in model.state_dict().items():
        shard[name] = weight(name, like, generator)
        if sum(tensor.nbytes for tensor in shard.values()) > SHARD:
            yield shard
            shard = {}
    yield shard


def write(model: nn.Module, folder: Path, stem: str, seed: int) -> None:
    folder.mkdir(parents=True)
    bytes = 2 * sum(tensor.numel() for tensor in model.state_dict().values())
    files: dict[str, Path] = {}
    places: dict[str, str] = {}
    for number, shard in enumerate(track(shards(model, seed), folder.name, total=math.ceil(bytes / SHARD)), start=1):
        file = folder / f"{stem}-{number:05d}.safetensors"
        save_file(shard, file, {"format": "pt"})
        files |= {file.name: file}
        places |= dict.fromkeys(shard, file.name)
    if len(files) == 1:
        next(iter(files.values())).rename(folder / f"{stem}.safetensors")
        return
    names = {name: f"{stem}-{i:05d}-of-{len(files):05d}.safetensors" for i, name in enumerate(files, start=1)}
    for old, new in names.items():
        files[old].rename(folder / new)
    index = {"metadata": {"total_size": bytes}, "weight_map": {key: names[place] for key, place in places.items()}}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shift", type=float, default=6.0, help="6 is Z-Image's, 3 Z-Image-Turbo's")
    folder, shift = vars(parser.parse_args()).values()
    if folder.exists():
        raise SystemExit(f"{folder}: is there already; choose another")
    for seed, (part, model) in enumerate(parts().items()):
        write(model, folder / part, FILES[part], seed)
        shutil.copy(CONFIGS / part / "config.json", folder / part / "config.json")
    shutil.copytree(BUNDLED_MODELS["micro"] / "tokenizer", folder / "tokenizer")
    scheduler = json.loads((CONFIGS / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler | {"shift": shift}))
    shutil.copy(
        BUNDLED_MODELS["micro"] / "model_index.json", folder / "model_index.json"
    )  # it has no card, as the real one
    print(folder)


if __name__ == "__main__":
    main()
