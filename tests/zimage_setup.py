"""A small Z-Image transformer with random weights, and captions for it."""

import torch
from diffusers import ZImageTransformer2DModel

from fewstep.core.conditioning import EncodedPrompts

FEATURES = 24


def small_transformer():
    torch.manual_seed(0)
    model = ZImageTransformer2DModel(
        dim=48, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=FEATURES, axes_dims=[8, 8, 8],
        axes_lens=[512, 64, 64],
    )  # fmt: skip
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def prompts_of(lengths, seed=0):
    torch.manual_seed(seed)
    features = torch.randn(len(lengths), max(lengths), FEATURES)
    for row, length in enumerate(lengths):
        features[row, length:] = 0
    return EncodedPrompts(features, torch.tensor(lengths))
