"""The two towers of a CLIP model, from transformers' layout or open_clip's, with differentiable preprocessing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.models.checkpoints import load_processor
from fewstep.models.library_logs import silence_loggers
from fewstep.rewards.checkpoints import fill, load_model, read_tensors, reward_folder, weight_bytes
from fewstep.rewards.clip_layout import OPEN_CLIP_KEY, infer_config, to_transformers
from fewstep.rewards.preprocess import CLIP_MEAN, CLIP_STD, Preprocess, from_processor

OPEN_CLIP_CONFIG = "open_clip_config.json"


class ClipModel:
    """Image and text embeddings as unit vectors.

    Args:
        checkpoint: a folder or hub id with transformers' CLIPModel and its processor; or with open_clip's weights as
            safetensors, open_clip_config.json where it has one, and the tokenizer.
        device: "meta" makes shapes without weights, for ``fewstep plan``.

    Raises:
        UserError: something is missing or damaged; the message names it.
    """

    def __init__(self, checkpoint: str, device: torch.device | str = "cpu") -> None:
        from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

        folder = reward_folder(checkpoint)
        self.tokenizer = load_processor(CLIPTokenizer, str(folder))
        if (folder / "config.json").is_file() and not (folder / OPEN_CLIP_CONFIG).is_file():
            self.model: Any = load_model(CLIPModel, str(folder), device)
            settings = load_processor(CLIPImageProcessor, str(folder)).to_dict()
            self.preprocess = from_processor(settings, checkpoint)
        else:
            self.model = _from_open_clip(folder, self.tokenizer.eos_token_id).to(device)
            self.preprocess = _open_clip_preprocess(folder, self.model.config.vision_config.image_size)
        self.device = torch.device(device)
        self.max_tokens: int = self.model.config.text_config.max_position_embeddings

    def image(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] -> unit vectors [B, E], with gradient."""
        return F.normalize(self.image_features(images), dim=-1)

    def image_features(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] -> [B, E], before normalization."""
        pooled = self.model.vision_model(pixel_values=self.preprocess(images).to(self.device)).pooler_output
        return self.model.visual_projection(pooled).float()

    @torch.no_grad()
    def text(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> unit vectors [B, E]. What is longer than the model takes is cut."""
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=self.max_tokens, return_tensors="pt"
        )
        # padding follows the text, and attention is causal: no mask is needed
        pooled = self.model.text_model(input_ids=tokens.input_ids.to(self.device)).pooler_output
        return F.normalize(self.model.text_projection(pooled).float(), dim=-1)

    @property
    def scale(self) -> Tensor:
        """The trained factor of the cosine (exp of ``logit_scale``)."""
        return self.model.logit_scale.exp()

    @property
    def weight_bytes(self) -> int:
        return weight_bytes(self.model)

    @property
    def activation_bytes(self) -> int:
        """Bytes of an image's activations without gradient, of the widest layer in fp32."""
        vision = self.model.config.vision_config
        tokens = (vision.image_size // vision.patch_size) ** 2 + 1
        return 4 * (tokens * (2 * vision.intermediate_size + 3 * vision.hidden_size) + 6 * vision.image_size**2)


def _from_open_clip(folder: Path, eos_token_id: int) -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    weights = read_tensors(folder, OPEN_CLIP_KEY, "CLIP model in transformers' or open_clip's layout")
    prefix = next(name for name in weights if name.endswith(OPEN_CLIP_KEY)).removesuffix(OPEN_CLIP_KEY)
    weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    config = infer_config(weights, eos_token_id, bool(_open_clip_config(folder, "model_cfg").get("quick_gelu")))
    with silence_loggers(), torch.device("meta"):
        model = CLIPModel(CLIPConfig(**config))
    for name, buffer in model.named_buffers():  # position ids, in no file
        if buffer.device.type == "meta":
            owner = model.get_submodule(name.rpartition(".")[0])
            owner.register_buffer("position_ids", torch.arange(buffer.shape[-1])[None], persistent=False)
    return fill(model, to_transformers(weights), folder)


def _open_clip_preprocess(folder: Path, size: int) -> Preprocess:
    settings = _open_clip_config(folder, "preprocess_cfg")
    return Preprocess(size, size, tuple(settings.get("mean", CLIP_MEAN)), tuple(settings.get("std", CLIP_STD)))


def _open_clip_config(folder: Path, section: str) -> dict[str, Any]:
    file = folder / OPEN_CLIP_CONFIG
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))[section]
        return dict(found)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: cannot be read ({error})") from None
