"""Weights of CLIP in open_clip's layout as those of transformers' CLIPModel."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

#: A weight that only open_clip's layout has.
OPEN_CLIP_KEY = "visual.conv1.weight"
#: Width of an attention head where it is not 64: ViT-H, ViT-g, ViT-bigG (open_clip's model_configs).
HEAD_WIDTHS = {1280: 80, 1408: 88, 1664: 104}

_RENAMED = (
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.conv1\.weight$", "vision_model.embeddings.patch_embedding.weight"),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^token_embedding\.weight$", "text_model.embeddings.token_embedding.weight"),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^text_projection$", "text_projection.weight"),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)


def to_transformers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's weights under transformers' names: projections transposed, fused attention split."""
    found: dict[str, Tensor] = {}
    for key, tensor in weights.items():
        name = key
        for pattern, replacement in _RENAMED:
            name = re.sub(pattern, replacement, name)
        if ".attn.in_proj_" in name:
            stem, kind = name.split(".attn.in_proj_")
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                found[f"{stem}.self_attn.{part}_proj.{kind}"] = piece.clone()
        elif name in ("visual_projection.weight", "text_projection.weight"):
            found[name] = tensor.T.contiguous()
        elif name != "attn_mask":  # a buffer of older files
            found[name] = tensor
    return found


def infer_config(weights: Mapping[str, Tensor], eos_token_id: int, quick_gelu: bool) -> dict[str, Any]:
    """The arguments of transformers' CLIPConfig for weights in open_clip's layout, by their shapes."""
    patches, width = weights["visual.positional_embedding"].shape
    patch = weights[OPEN_CLIP_KEY].shape[-1]
    vocabulary, text_width = weights["token_embedding.weight"].shape
    shared = {"hidden_act": "quick_gelu" if quick_gelu else "gelu"}
    embed = weights["text_projection"].shape[1]
    vision = {
        "hidden_size": width,
        "intermediate_size": weights["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
        "num_hidden_layers": _layers(weights, "visual.transformer.resblocks."),
        "num_attention_heads": width // HEAD_WIDTHS.get(width, 64),
        "image_size": patch * round((patches - 1) ** 0.5),
        "patch_size": patch,
        "projection_dim": embed,
    }
    text = {
        "vocab_size": vocabulary,
        "hidden_size": text_width,
        "intermediate_size": weights["transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
        "num_hidden_layers": _layers(weights, "transformer.resblocks."),
        "num_attention_heads": text_width // 64,
        "max_position_embeddings": weights["positional_embedding"].shape[0],
        "eos_token_id": eos_token_id,
        "projection_dim": embed,
    }
    return {"vision_config": vision | shared, "text_config": text | shared, "projection_dim": embed}


def _layers(weights: Mapping[str, Tensor], prefix: str) -> int:
    return 1 + max(int(key.removeprefix(prefix).split(".")[0]) for key in weights if key.startswith(prefix))
