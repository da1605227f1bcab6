"""Objectives that are refused for few-step students, by the names that other trainers have for them."""

from __future__ import annotations

from collections.abc import Iterable

_FORWARD = (
    "its loss is on the forward flow matching process, which a few-step student does not follow: SD3.5-M at 4 steps "
    "fell from an HPSv3 of 11.72 to 9.70 (DMD with NFT) and from 12.52 to -3.28 (CDM with NFT), and NFT's author does "
    "not support distilled models"
)
_WEIGHTED = (
    "flow matching on the student's own samples weighted by reward made every student worse that it was tried on "
    "(three of three)"
)
REASONS = {
    "nft": _FORWARD,
    "diffusion_nft": _FORWARD,
    "awm": _FORWARD,
    "advantage_weighted_matching": _FORWARD,
    "reward_weighted_flow_matching": _WEIGHTED,
    "rwfm": _WEIGHTED,
}
_INSTEAD = "use reward for rewards with gradient, surrogate or grpo for others"


def check_refused(names: Iterable[object]) -> None:
    """Raises: ValueError for a refused objective, with the reason and what to use."""
    for name in names:
        key = str(name).lower().replace("-", "_")
        if key in REASONS:
            raise ValueError(f"{name} is refused for distilled students: {REASONS[key]}; {_INSTEAD}")
