"""A program for torchrun: a denoiser's values and gradients, alone and with its tokens divided among the processes."""

import copy
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from fewstep.core.conditioning import EncodedPrompts
from fewstep.models.context_parallel import ContextParallel
from fewstep.models.denoiser import TransformerDenoiser
from fewstep.models.pipeline import load
from fewstep.training.distributed import DistContext, init_distributed


def figures(denoiser: TransformerDenoiser, x: Tensor, sigma: Tensor, prompts: EncodedPrompts) -> dict[str, Tensor]:
    """Of two denoisings in a row and the features of the second: values, and gradients of the input and the weights.
    The gradient passes through both, as it does through a student and the teacher's features."""
    x = x.clone().requires_grad_(True)
    denoiser.zero_grad()
    middle = x - sigma.view(-1, *[1] * (x.ndim - 1)) * denoiser(x, sigma, prompts)
    velocity, features = denoiser(middle, 0.5 * sigma, prompts), denoiser.features(middle, sigma, prompts, (0.5, 1.0))
    ((velocity**2).mean() + (features**2).mean() * 0.1).backward()
    found = {"velocity": velocity, "features": features, "x": x.grad}
    found |= {name: weight.grad for name, weight in denoiser.named_parameters() if weight.grad is not None}
    return {name: tensor.detach().clone() for name, tensor in found.items() if tensor is not None}


def main(dist: DistContext, folder: str, frames: int, out: str) -> None:
    pipeline = load(folder)
    alone = pipeline.denoiser.float().requires_grad_(True)
    divided = pipeline.family.denoiser(copy.deepcopy(alone.transformer))
    divided.enable_context_parallel(ContextParallel(dist.context_mesh["ring", "ulysses"]))
    torch.manual_seed(0)
    x = torch.randn(2, *pipeline.latent_shape(32, 32 if frames == 1 else 48, frames))
    sigma, prompts = torch.tensor([0.9, 0.4]), pipeline.encode(["a b", "c d e f"])
    expected, found = (figures(each, x, sigma, prompts) for each in (alone, divided))
    dist.sync_unsharded_grads(divided.parameters())
    found |= {name: weight.grad for name, weight in divided.named_parameters() if weight.grad is not None}
    errors = {
        name: float((found[name] - tensor).norm() / tensor.norm().clamp_min(1e-6)) for name, tensor in expected.items()
    }
    assert found.keys() == expected.keys()
    Path(f"{out}-{dist.rank}.json").write_text(json.dumps(errors))


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, frames, out, size = sys.argv[1:]
    with init_distributed("cpu") as opened:
        main(DistContext(opened.rank, opened.world_size, opened.device, int(size)), folder, int(frames), out)
