"""The chain of linear layers that LAION's aesthetic predictor and ImageReward end with."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.rewards.checkpoints import fill

#: "layers.0.weight", whose module of dropout between them has a number too.
_LAYER = re.compile(r"(?:.*\.)?layers\.(\d+)\.(weight|bias)")


def score_head(weights: Mapping[str, Tensor], where: str) -> nn.Module:
    """Features [B, E] -> scores [B, 1]: the layers ``layers.<number>.weight`` and ``.bias`` in order, without
    nonlinearity between them, as both were trained; dropout has no effect in use.

    Raises:
        UserError: there are no such layers, or they do not fit one another.
    """
    found: dict[int, dict[str, Tensor]] = {}
    for name, tensor in weights.items():
        match = _LAYER.fullmatch(name)
        if match is not None:
            found.setdefault(int(match[1]), {})[match[2]] = tensor
    chain = [found[number] for number in sorted(found)]
    if not chain or any(part.keys() != {"weight", "bias"} for part in chain) or chain[-1]["weight"].shape[0] != 1:
        raise UserError(
            f"{where}: no head of linear layers (layers.0.weight, layers.0.bias, ...) that ends in one score"
        )
    layers = nn.Sequential(*(nn.Linear(part["weight"].shape[1], part["weight"].shape[0]) for part in chain))
    flat = {f"{index}.{kind}": tensor for index, part in enumerate(chain) for kind, tensor in part.items()}
    return fill(layers, flat, where)
