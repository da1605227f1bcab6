"""ImageReward (arXiv 2304.05977): BLIP with cross attention from the prompt to the image, and a head."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.models.checkpoints import load_processor
from fewstep.models.library_logs import silence_loggers
from fewstep.rewards.checkpoints import fill, read_tensors, reward_folder, weight_bytes
from fewstep.rewards.preprocess import Preprocess
from fewstep.rewards.protocol import RewardInfo
from fewstep.rewards.score_head import score_head

#: Mean and standard deviation of the raw scores of ImageReward-v1.0 (its inference code).
MEAN, STD = 0.16717362830052426, 1.0333394966054072
MAX_TOKENS = 35  # of a prompt, as it was trained
HEAD_WIDTH = 64  # of an attention head, in ViT and BERT

#: Names of the original BLIP's image encoder as those of transformers' BlipVisionModel. The text encoder's are equal.
_RENAMED = (
    (r"^blocks\.", "encoder.layers."),
    (r"^norm\.", "post_layernorm."),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"\.norm([12])\.", r".layer_norm\1."),
)


class ImageReward:
    """The normalized score of ImageReward-v1.0, without bound; over its training data it has mean 0 and deviation 1.

    Args:
        checkpoint: a folder or hub id with the tensors of ImageReward.pt as safetensors, under their own names
            (blip.visual_encoder.*, blip.text_encoder.*, mlp.layers.*), and the tokenizer of bert-base-uncased. The .pt
            file itself is a pickle, and not read.

    Raises:
        UserError: something is missing or damaged; the message names it.
    """

    name = "imagereward"

    def __init__(self, checkpoint: str, device: torch.device | str = "cpu") -> None:
        from transformers import BertTokenizer

        folder = reward_folder(checkpoint)
        self.tokenizer = load_processor(BertTokenizer, str(folder))
        weights = read_tensors(folder, "blip.visual_encoder.cls_token", "ImageReward")
        vision = _part(weights, "blip.visual_encoder.", _RENAMED)
        text = _part(weights, "blip.text_encoder.", ())
        size = _image_size(vision)
        self.vision, self.text = _towers(vision, text, size, checkpoint)
        self.vision.to(device)
        self.text.to(device)
        self.head = score_head(_part(weights, "mlp.", ()), checkpoint).to(device)
        self.preprocess = Preprocess(size, size)
        config: Any = self.vision.config
        tokens = (size // config.patch_size) ** 2 + 1
        self.info = RewardInfo(
            differentiable=True,
            range=(-math.inf, math.inf),
            license="Apache-2.0 (ImageReward), BSD-3-Clause (BLIP)",
            parameters=weight_bytes(self.vision, self.text, self.head),
            activations=4 * (tokens * (2 * config.intermediate_size + 3 * config.hidden_size) + 6 * size**2),
        )

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores float32 [B], with gradient to the images. Prompts are cut after 35 tokens.

        Args:
            images: [B, 3, H, W] in [0, 1].
        """
        device = next(self.head.parameters()).device
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        )
        seen = self.vision(pixel_values=self.preprocess(images).to(device)).last_hidden_state
        # as it is added to the scores; transformers would look into a mask of zeros and ones, which "meta" has not
        padded = (1 - tokens.attention_mask[:, None, None].to(device, torch.float32)) * torch.finfo(torch.float32).min
        read = self.text(
            input_ids=tokens.input_ids.to(device), attention_mask=padded, encoder_hidden_states=seen
        ).last_hidden_state
        return ((self.head(read[:, 0])[:, 0] - MEAN) / STD).float()


def _part(weights: Mapping[str, Tensor], prefix: str, renamed: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
    found = {}
    for key, tensor in weights.items():
        if key.startswith(prefix):
            name = key.removeprefix(prefix)
            for pattern, replacement in renamed:
                name = re.sub(pattern, replacement, name)
            found[name] = tensor
    return found


def _image_size(vision: Mapping[str, Tensor]) -> int:
    patches = vision["embeddings.position_embedding"].shape[1] - 1
    return vision["embeddings.patch_embedding.weight"].shape[-1] * round(patches**0.5)


def _towers(
    vision: Mapping[str, Tensor], text: Mapping[str, Tensor], size: int, where: str
) -> tuple[nn.Module, nn.Module]:
    """transformers' BLIP encoders; all sizes are read from the weights. Raises: UserError."""
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    try:
        width, read_width = vision["embeddings.class_embedding"].shape[-1], text["embeddings.word_embeddings.weight"]
        seen = BlipVisionConfig(
            hidden_size=width,
            intermediate_size=vision["encoder.layers.0.mlp.fc1.weight"].shape[0],
            num_hidden_layers=_layers(vision, "encoder.layers."),
            num_attention_heads=width // HEAD_WIDTH,
            image_size=size,
            patch_size=vision["embeddings.patch_embedding.weight"].shape[-1],
            layer_norm_eps=1e-6,  # BLIP's own; transformers' conversions have 1e-5
        )
        read = BlipTextConfig(
            vocab_size=read_width.shape[0],
            hidden_size=read_width.shape[1],
            intermediate_size=text["encoder.layer.0.intermediate.dense.weight"].shape[0],
            num_hidden_layers=_layers(text, "encoder.layer."),
            num_attention_heads=read_width.shape[1] // HEAD_WIDTH,
            max_position_embeddings=text["embeddings.position_embeddings.weight"].shape[0],
            encoder_hidden_size=width,
        )
    except KeyError as error:
        raise UserError(f"{where}: the tensor {error} of ImageReward is missing") from None
    with silence_loggers():
        towers = BlipVisionModel(seen), BlipTextModel(read, add_pooling_layer=False)
    own = {name: tensor for name, tensor in towers[1].state_dict().items() if name.endswith("position_ids")}
    return fill(towers[0], dict(vision), where), fill(towers[1], {**text, **own}, where)


def _layers(weights: Mapping[str, Tensor], prefix: str) -> int:
    return 1 + max(int(key.removeprefix(prefix).split(".")[0]) for key in weights if key.startswith(prefix))
