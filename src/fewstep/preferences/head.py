"""The preference head: a linear score of frozen features, and its two files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fewstep.atomic import atomic_folder, is_litter, write_tensors, write_text
from fewstep.errors import UserError
from fewstep.machine import reading, reason

WEIGHTS, DESCRIPTION = "preference.safetensors", "preference.json"
FORMAT = 1


@dataclass(frozen=True)
class PreferenceHead:
    """score = weight . (features - center) / scale, in log-odds: P(a preferred to b) = sigmoid(score_a - score_b).

    Attributes:
        weight, center, scale: [D]; center and scale are the mean and standard deviation of the training images'
            features.
    """

    weight: Tensor
    center: Tensor
    scale: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """[B, D] -> float32 [B], with gradient to the features."""
        weight, center, scale = (part.to(features.device) for part in (self.weight, self.center, self.scale))
        return ((features.float() - center) / scale) @ weight


def save_head(folder: str | Path, head: PreferenceHead, description: dict[str, Any]) -> None:
    """Write the folder of a head, in place of an earlier one. Raises: UserError if it cannot be written."""
    with atomic_folder(folder) as draft:
        tensors = {"weight": head.weight, "center": head.center, "scale": head.scale}
        write_tensors(draft / WEIGHTS, {name: tensor.float() for name, tensor in tensors.items()})
        text = json.dumps({"format": FORMAT, **description}, indent=2, ensure_ascii=False, allow_nan=False)
        write_text(draft / DESCRIPTION, text + "\n")


def load_head(folder: str | Path) -> tuple[PreferenceHead, dict[str, Any]]:
    """A head and its description.

    Raises:
        UserError: a file is missing or damaged; the message names it.
    """
    folder = Path(folder)
    for name in (WEIGHTS, DESCRIPTION):
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing; fewstep prefs train writes a head")
    file = folder / DESCRIPTION
    try:
        with reading(file):
            description = json.loads(file.read_text(encoding="utf-8"))
        if description["format"] != FORMAT or not isinstance(description["features"], str):
            raise ValueError(f"its format is {description['format']!r}, not {FORMAT}")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} does not describe a preference head ({reason(error)})") from None
    try:
        tensors = load_file(folder / WEIGHTS)
        head = PreferenceHead(tensors["weight"], tensors["center"], tensors["scale"])
        shapes = {tuple(tensor.shape) for tensor in (head.weight, head.center, head.scale)}
        if len(shapes) != 1 or head.weight.ndim != 1:
            raise ValueError(f"shapes {sorted(shapes)}")
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise UserError(f"{folder / WEIGHTS} does not hold a preference head ({reason(error)})") from None
    return head, description


def check_free(folder: str | Path, *, overwrite: bool) -> None:
    """Check that a folder can hold a new head.

    Raises:
        UserError: it holds other files, or a head and ``overwrite`` is false.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return
    others = [path.name for path in sorted(folder.iterdir()) if not is_litter(path)]
    if unknown := [name for name in others if name not in (WEIGHTS, DESCRIPTION)]:
        raise UserError(f"{folder}: holds other files, such as {unknown[0]}; use another --out")
    if others and not overwrite:
        raise UserError(f"{folder}: holds a head already; use another --out, or --overwrite")


def fit_head(features: Tensor, winners: Tensor, losers: Tensor, outcomes: Tensor, l2: float) -> PreferenceHead:
    """The head that minimizes the mean of ``-log sigmoid(r_winner - r_loser)`` over votes, plus ``l2 / 2 |weight|^2``.

    It is the model of Bradley and Terry (1952) with a rating that is linear in features, the loss of reward models
    (arXiv 2203.02155, equation 1). A vote with outcome 1/2, a tie, counts as half a win for each side. The problem is
    convex: L-BFGS in float64 from 0.

    Args:
        features: [N, D] of the images.
        winners, losers: indices of images [V].
        outcomes: [V], 1 where the winner won, 1/2 for a tie.
    """
    rows = torch.cat([winners, losers]).unique()
    used = features.double()[rows]
    center, scale = used.mean(0), used.std(0, correction=0)
    scale = torch.where(scale > 1e-6 * scale.max().clamp(min=1e-12), scale, torch.inf)  # constant ones have no part
    normalized = (features.double() - center) / scale
    difference = normalized[winners] - normalized[losers]
    # the best weight is a combination of the differences: with fewer of these than features, their span is sufficient
    basis = torch.linalg.svd(difference, full_matrices=False).Vh if len(difference) < difference.shape[1] else None
    inputs = difference if basis is None else difference @ basis.T
    found = _minimize(inputs, outcomes.double(), l2)
    weight = found if basis is None else found @ basis
    constant = scale.isinf()
    weight[constant], scale[constant] = 0.0, 1.0
    return PreferenceHead(weight.float(), center.float(), scale.float())


def _minimize(differences: Tensor, outcomes: Tensor, l2: float) -> Tensor:
    weight = torch.zeros(differences.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight], max_iter=200, tolerance_grad=1e-8, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = vote_loss(differences @ weight, outcomes) + l2 / 2 * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    return weight.detach()


def vote_loss(margins: Tensor, outcomes: Tensor) -> Tensor:
    """The mean of ``-(o log sigmoid(m) + (1 - o) log sigmoid(-m))`` over votes.

    Args:
        margins: [V], score of the first image minus that of the second.
        outcomes: [V], 1 if the first won, 0 if the second, 1/2 for a tie.
    """
    return torch.nn.functional.binary_cross_entropy_with_logits(margins, outcomes)
