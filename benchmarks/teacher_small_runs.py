"""Small runs that show what limits the micro teacher: optimizers, size, training from scratch, other latents.

Every run trains a transformer by flow matching on the emoji dataset, on one thread, and is measured on 100 validation
prompts: the mean squared error of one prediction of x0 from a real latent plus noise, relative to the variance of the
latents, at four noise levels; and the accuracy of the nearest real emoji, at 20 steps with guidance and at 4 without,
sampled in bf16. Runs on 20 objects are measured on their training prompts and latents too.

    python benchmarks/teacher_small_runs.py NAME [...] [--out runs/small] [--vae FOLDER] [--scale 1]

A name is that of a run or of a group of runs: objects (20 objects from scratch, to memorize them), optimizer (the
bundled transformer further), size (from scratch), latents (from scratch, for the autoencoder --vae); or bundled (as it
is). Finished runs are kept: the same command resumes. The figures are in ``<out>/<run>/figures.json``.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from fewstep.config.load import parse_recipe, read_yaml
from fewstep.core import flow
from fewstep.core.conditioning import EncodedPrompts
from fewstep.core.denoiser import predict_x0
from fewstep.emoji import train_flow_matching
from fewstep.emoji.dataset import EmojiDataset
from fewstep.emoji.latents import LatentBank, image_key
from fewstep.emoji.nearest_real import NearestReal
from fewstep.emoji.recipes import FlowMatchingRecipe
from fewstep.emoji.teacher_quality import generated, prompts_of
from fewstep.evaluation.images import as_uint8
from fewstep.models.pipeline import TextToImagePipeline, load
from fewstep.training.run_dir import RunDir

SIGMAS = (0.3, 0.5, 0.7, 0.9)
PROMPTS = 100
STEPS, GUIDANCE, FEW_STEPS = 20, 2.0, 4

SMALL = {"dim": 192, "n_layers": 7, "n_refiner_layers": 1, "n_heads": 4, "axes_dims": [16, 16, 16]}
DEEP = SMALL | {"n_layers": 10}
WIDE = SMALL | {"dim": 256, "n_layers": 6, "axes_dims": [16, 24, 24]}

BASE: dict[str, Any] = {
    "kind": "flow_matching", "text_encoder": "micro", "shift": 3.0, "logit_mean": -0.5,
    "guidance_scale": GUIDANCE, "prompt_dropout": 0.1, "compile": True, "model": SMALL,
}  # fmt: skip
OPTIM: dict[str, Any] = {
    "betas": [0.9, 0.98], "warmup_steps": 50, "lr_schedule": "linear", "min_lr_ratio": 0.01, "ema_decay": 0.995,
}  # fmt: skip
TRAIN = {"batch_size": 32, "precision": "bf16", "log_every": 25, "save_every": 50, "num_threads": 1}

TWENTY: dict[str, Any] = {"data": {"num_objects": 20, "augmentations_per_object": 3}}
ALL: dict[str, Any] = {"data": {"augmentations_per_object": 8}}
FURTHER = ALL | {"init": "micro", "caption_noise": 0.2}
ADAMW, MUON = {"optimizer": "adamw", "lr": 3e-3}, {"optimizer": "muon", "lr": 3e-3}

#: Group -> run -> (steps, optimizer, other fields). A step of 20-muon took 0.36 s of one core, of 20-adamw 0.31 s; the
#: steps of the other groups are meant for ten minutes of a free core, and are estimates.
RUNS: dict[str, dict[str, tuple[int, dict[str, Any], dict[str, Any]]]] = {
    "objects": {
        "20-muon": (1000, MUON, TWENTY),
        "20-adamw": (1000, ADAMW, TWENTY),
    },
    "optimizer": {
        "bundled-muon": (1500, MUON | {"lr": 2e-3}, FURTHER),
        "bundled-adamw": (1800, ADAMW | {"lr": 2e-3}, FURTHER),
    },
    "size": {
        "192x7": (1800, MUON, ALL),
        "192x10": (1300, MUON, ALL | {"model": DEEP}),
        "256x6": (1100, MUON, ALL | {"model": WIDE}),
    },
    "latents": {"other-latents": (1800, MUON, ALL)},
}


def recipe(name: str, steps: int, optim: dict[str, Any], fields: dict[str, Any], vae: str) -> FlowMatchingRecipe:
    """The recipe of a run."""
    values = (
        BASE | {"name": f"small-{name}", "vae": vae, "optim": OPTIM | optim, "train": TRAIN | {"steps": steps}} | fields
    )
    parsed = parse_recipe(values, name)
    assert isinstance(parsed, FlowMatchingRecipe)
    return parsed


@torch.no_grad()
def x0_errors(model: TextToImagePipeline, latents: Tensor, prompts: EncodedPrompts) -> dict[str, float]:
    """Mean squared error of one prediction of x0 at each of SIGMAS, relative to the variance of ``latents``."""
    eps = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    errors = {}
    for level in SIGMAS:
        sigma = torch.full((len(latents),), level)
        predicted = predict_x0(model.denoiser, flow.add_noise(latents, sigma, eps), sigma, prompts)
        errors[f"x0_error_{level:g}"] = float((predicted - latents).square().mean() / latents.var())
    return errors


def measure(model: TextToImagePipeline, num_objects: int | None, bank: LatentBank | None = None) -> dict[str, float]:
    """Errors and accuracies on validation prompts; with a ``bank``, on the training prompts and latents in it."""
    dataset = EmojiDataset.load(num_objects)
    specs = dataset.sample(PROMPTS, "validation" if bank is None else "train")
    texts = prompts_of(specs)
    if bank is None:
        latents = model.encode_images(dataset.render(specs, torch.Generator().manual_seed(0)))
    else:
        latents = torch.stack([bank.latents[bank.row[image_key(spec)], 0] for spec in specs]).float()
    scorer = NearestReal()

    def nearest(images: Tensor) -> float:
        return float(scorer.score(images, texts)["nearest_real_acc"].mean())

    def sampled(steps: int, guidance: float) -> float:
        with torch.autocast("cpu", torch.bfloat16):
            images = generated(model, texts, steps, guidance)
        return nearest(images)

    return x0_errors(model, latents, model.encode(texts)) | {
        "nearest_real_decoded": nearest(as_uint8(model.decode(latents).clamp(0, 1))),
        "nearest_real": sampled(STEPS, GUIDANCE),
        "nearest_real_few": sampled(FEW_STEPS, 0.0),
    }


def run(name: str, out: Path, vae: str, scale: float) -> dict[str, Any]:
    """Train and measure one run, or read its figures if it has been measured."""
    folder, file = out / name, out / name / "figures.json"
    if file.exists():
        return json.loads(file.read_text())
    steps, optim, fields = next(runs[name] for runs in RUNS.values() if name in runs)
    resolved = recipe(name, round(scale * steps), optim, fields, vae)
    folder.mkdir(parents=True, exist_ok=True)
    share_latents(folder, [out / other for each in RUNS.values() for other in each], resolved)
    with RunDir(folder, resolved) as directory:
        train_flow_matching.train(resolved, directory)
    model = load(folder / "model", "cpu")
    objects = resolved.data.num_objects
    figures: dict[str, Any] = {
        "steps": resolved.train.steps,
        "parameters": sum(p.numel() for p in model.transformer.parameters()),
        "validation": measure(model, objects),
    }
    if objects is not None:
        specs = EmojiDataset.load(objects).specs("train")
        rows = {key: row for row, key in enumerate(dict.fromkeys(image_key(spec) for spec in specs))}
        bank = LatentBank(load_file(folder / "latents.safetensors")["latents"], rows)
        figures["trained"] = measure(model, objects, bank)
    file.write_text(json.dumps(figures, indent=1) + "\n")
    return figures


def share_latents(folder: Path, others: list[Path], resolved: FlowMatchingRecipe) -> None:
    """Link the encoded latents of a run of the same autoencoder and images, if there is one, instead of encoding."""
    target = folder / "latents.safetensors"
    for other in others:
        source, settings = other / "latents.safetensors", other / "recipe.yaml"
        if target.exists() or not (source.exists() and settings.exists()):
            continue
        found = train_recipe(settings)
        if found.vae == resolved.vae and found.data == resolved.data:
            os.link(source, target)


def train_recipe(file: Path) -> FlowMatchingRecipe:
    """The recipe of an earlier run."""
    parsed = parse_recipe(read_yaml(file), str(file))
    assert isinstance(parsed, FlowMatchingRecipe)
    return parsed


def row(name: str, steps: int, figures: dict[str, float]) -> str:
    """A row of the table."""
    errors = " / ".join(f"{figures[f'x0_error_{level:g}']:.3f}" for level in SIGMAS)
    accuracies = [f"{figures[key]:.0%}" for key in ("nearest_real_decoded", "nearest_real", "nearest_real_few")]
    return "| " + " | ".join([name, f"{steps:,}", errors, *accuracies]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*RUNS, *(name for runs in RUNS.values() for name in runs), "bundled"]
    parser.add_argument("names", nargs="+", choices=names, metavar="NAME")
    parser.add_argument("--out", type=Path, default=Path("runs/small"))
    parser.add_argument("--vae", default="micro", help="a folder with vae/, or a bundled model's name")
    parser.add_argument("--scale", type=float, default=1.0, help="factor of the steps")
    arguments = parser.parse_args()
    table = []
    for given in arguments.names:
        if given == "bundled":
            table.append(row(given, 0, measure(load("micro", "cpu"), None)))
        else:
            for name in RUNS.get(given, [given]):
                figures = run(name, arguments.out, arguments.vae, arguments.scale)
                table += [
                    row(f"{name}, {which}", figures["steps"], figures[which])
                    for which in ("validation", "trained")
                    if which in figures
                ]
    errors = " / ".join(f"{level:g}" for level in SIGMAS)
    columns = [
        "run",
        "steps",
        f"error at sigma {errors}",
        "decoded",
        f"nearest real, {STEPS} steps",
        f"{FEW_STEPS} steps",
    ]
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    print("\n".join(table))


if __name__ == "__main__":
    main()
