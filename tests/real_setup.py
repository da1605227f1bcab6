"""WebDataset shards of latents and images with prompts."""

import io
import json

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save
from stream_setup import write_tar

SHAPE = (16, 8, 8)  # of the tiny model's latents
SIDE = 64  # of its images


def npy(latent):
    content = io.BytesIO()
    np.save(content, np.asarray(latent))
    return content.getvalue()


def latent_of(number, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(number))


def image_of(number, size=(SIDE, SIDE)):
    pixels = torch.randint(256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(number))
    return Image.fromarray(pixels.byte().numpy())


def image_bytes(number, kind="png", size=(SIDE, SIDE)):
    content = io.BytesIO()
    image_of(number, size).save(content, {"jpg": "jpeg"}.get(kind, kind))
    return content.getvalue()


def prompt_of(number):
    return f"animal number {number}"


def write_latents(folder, shards=4, count=10, first=0):
    """The value of ``method.real_source``; latent i is ``latent_of(i)``, of prompt ``prompt_of(i)``. Every second one
    is a .safetensors member, and has its prompt in a .json member."""
    folder.mkdir(exist_ok=True)
    for shard in range(shards):
        members = []
        for number in range(first + shard * count, first + (shard + 1) * count):
            if number % 2:
                members += [(f"{number}.safetensors", save({"latent": latent_of(number)}))]
                members += [(f"{number}.json", json.dumps({"prompt": prompt_of(number)}))]
            else:
                members += [(f"{number}.npy", npy(latent_of(number))), (f"{number}.txt", prompt_of(number))]
        write_tar(folder / f"latents-{shard:03}.tar", members)
    return f"{folder}/latents-{{000..{shards - 1:03}}}.tar"
