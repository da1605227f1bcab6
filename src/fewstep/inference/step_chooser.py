"""The number of steps that a prompt needs, predicted from its features: ``steps.safetensors`` in a model's folder.

An ordinal regression with one direction for all counts: P(more than count k is needed) = sigmoid(w z - b_k), where z
are the prompt's features, averaged over its tokens and standardized, and b_k ascend. It costs no evaluation of the
transformer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fewstep.atomic import write_tensors
from fewstep.core.batching import batched
from fewstep.core.conditioning import EncodedPrompts
from fewstep.data.trajectories import template_hash
from fewstep.errors import UserError
from fewstep.inference.prompt_parts import PART
from fewstep.models.text import PromptEncoder

STEP_CHOOSER = "steps.safetensors"
FORMAT = 1
_NAMES = ("mean", "scale", "weights", "offsets")


def pooled(prompts: EncodedPrompts) -> Tensor:
    """The features of each prompt averaged over its tokens, fp32 [B, D] on the CPU."""
    features = prompts.features.float().cpu()
    return features.sum(dim=1) / prompts.lengths[:, None].float()


@dataclass(frozen=True)
class StepChooser:
    """
    Attributes:
        counts: numbers of steps, ascending.
        threshold: the least count is taken of which P(more is needed) is at most this.
        mean, scale: [D], of the features that it was trained on.
        weights: [D]. offsets: [len(counts) - 1], ascending.
        made_by: hash of the tokenizer and the prompt template.
    """

    counts: tuple[int, ...]
    threshold: float
    mean: Tensor
    scale: Tensor
    weights: Tensor
    offsets: Tensor
    made_by: str

    def more_needed(self, features: Tensor) -> Tensor:
        """P(more than count k is needed), [B, len(counts) - 1], for pooled features [B, D]."""
        standardized = (features - self.mean) / self.scale
        return torch.sigmoid((standardized @ self.weights)[:, None] - self.offsets)

    def choose(self, features: Tensor) -> list[int]:
        """The count of each prompt, for pooled features [B, D]."""
        # probabilities descend with k, so that those above the threshold are the first ones
        return [self.counts[index] for index in (self.more_needed(features) > self.threshold).sum(dim=1).tolist()]

    def save(self, folder: Path) -> Path:
        """Write it into a model's folder. Raises: UserError if it cannot be written."""
        header = {"format": FORMAT, "counts": self.counts, "threshold": self.threshold, "made_by": self.made_by}
        tensors = {name: getattr(self, name).contiguous() for name in _NAMES}
        write_tensors(folder / STEP_CHOOSER, tensors, {"fewstep.steps": json.dumps(header)})
        return folder / STEP_CHOOSER

    @classmethod
    def load(cls, folder: Path) -> StepChooser | None:
        """That of a model's folder; None if it has none. Raises: UserError if it cannot be read."""
        file = folder / STEP_CHOOSER
        if not file.exists():
            return None
        try:
            with safe_open(file, "pt") as opened:
                header = json.loads(opened.metadata()["fewstep.steps"])
                tensors = {name: opened.get_tensor(name) for name in _NAMES}
            counts, sizes = tuple(int(count) for count in header["counts"]), {len(tensors[name]) for name in _NAMES[:3]}
            if header["format"] != FORMAT or len(tensors["offsets"]) != len(counts) - 1 or len(sizes) != 1:
                raise ValueError("another format")
            return cls(counts, float(header["threshold"]), **tensors, made_by=header["made_by"])
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file}: cannot be read ({error}); make it again with fewstep steps train") from None


def prompt_features(
    encoder: PromptEncoder, prompts: Sequence[str], system: str | None = None, assistant_prefix: str = ""
) -> Tensor:
    """The pooled features of prompts, [N, D]. On a CPU each is encoded alone, so that it depends on no other.

    Raises:
        UserError: a prompt is too long, or not valid Unicode.
    """
    size = 1 if next(encoder.text_encoder.parameters()).device.type == "cpu" else PART
    parts = [prompts[part] for part in batched(len(prompts), size)]
    return torch.cat([pooled(encoder(part, system=system, assistant_prefix=assistant_prefix)) for part in parts])


def chosen_steps(
    folder: Path | None,
    encoder: PromptEncoder,
    prompts: Sequence[str],
    system: str | None = None,
    assistant_prefix: str = "",
) -> list[int]:
    """The number of steps of each prompt, by the chooser in a model's folder.

    Raises:
        UserError: there is none, or it is for other features; or a prompt cannot be encoded.
    """
    chooser = None if folder is None else StepChooser.load(folder)
    if chooser is None:
        raise UserError(f"steps auto: {folder or 'this model'} has no {STEP_CHOOSER}; make it with fewstep steps train")
    features = prompt_features(encoder, prompts, system, assistant_prefix)
    if chooser.made_by != template_hash(encoder) or len(chooser.mean) != features.shape[1]:
        raise UserError(
            f"steps auto: {STEP_CHOOSER} is for another text encoder or prompt template; make it again with "
            "fewstep steps train"
        )
    return chooser.choose(features)


def fit(features: Tensor, labels: Tensor, counts: Sequence[int], decay: float, made_by: str) -> StepChooser:
    """The regression with the largest likelihood of labels, less ``decay / 2 |w|^2``; threshold 1/2.

    Args:
        features: [N, D], pooled. labels: [N], indices into ``counts``.
    """
    mean, scale = features.mean(dim=0), features.std(dim=0).clamp_min(1e-6)
    standardized = ((features - mean) / scale).double()
    above = (labels[:, None] > torch.arange(len(counts) - 1)).double()
    weights = torch.zeros(features.shape[1], dtype=torch.float64, requires_grad=True)
    first = torch.zeros((), dtype=torch.float64, requires_grad=True)
    gaps = torch.zeros(len(counts) - 2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights, first, gaps], max_iter=500, line_search_fn="strong_wolfe")

    def offsets() -> Tensor:
        return torch.cat([first[None], first + torch.cumsum(torch.nn.functional.softplus(gaps), 0)])

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits = (standardized @ weights)[:, None] - offsets()
        found = torch.nn.functional.binary_cross_entropy_with_logits(logits, above) * (len(counts) - 1)
        found = found + decay / 2 * weights.square().sum()
        found.backward()
        return found

    optimizer.step(loss)
    parts = (weights.detach().float(), offsets().detach().float())
    return StepChooser(tuple(counts), 0.5, mean, scale, *parts, made_by)
