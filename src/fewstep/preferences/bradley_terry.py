"""Ratings from votes by the model of Bradley and Terry (Biometrika 39, 1952): P(i beats j) = sigmoid(s_i - s_j).

A tie counts as half a win for each side, as in Chatbot Arena's ratings (arXiv 2403.04132). One virtual tie is added for
each two models that were compared: ratings stay finite where a model won every vote. For two models that is Firth's
bias-reduced estimate (Biometrika 80, 1993), log((w + 1/2) / (l + 1/2)).
"""

from __future__ import annotations

import numpy as np

ELO_MEAN = 1000.0
ELO_SCALE = 400 / np.log(10)  # 400 points are odds of 10 to 1
VIRTUAL_TIES = 1.0  # for each two models that were compared

_MAX_ITERATIONS = 100
_TOLERANCE = 1e-9
_MAX_STEP = 2.0  # in log-odds


def fit(wins: np.ndarray, compared: np.ndarray) -> np.ndarray:
    """The strengths that maximize the likelihood with the virtual ties; they sum to 0. Newton's method.

    Args:
        wins: [..., K, K], at i, j how often i beat j, a tie counted as 0.5 in both places.
        compared: bool [K, K], where virtual ties are added; it connects all models.

    Returns:
        Strengths in log-odds, [..., K].
    """
    count = wins.shape[-1]
    won = wins + VIRTUAL_TIES / 2 * compared
    votes = won + won.swapaxes(-1, -2)
    strengths = np.zeros(wins.shape[:-1])
    for _ in range(_MAX_ITERATIONS):
        chance = 1 / (1 + np.exp(strengths[..., None, :] - strengths[..., :, None]))
        gradient = (won - votes * chance).sum(-1)
        curvature = -votes * chance * (1 - chance)
        curvature[..., range(count), range(count)] -= curvature.sum(-1)
        # the curvature has the direction of equal shifts as its kernel, which 1/K fills without changing the solution
        step = np.linalg.solve(curvature + 1 / count, gradient[..., None])[..., 0]
        strengths += np.clip(step, -_MAX_STEP, _MAX_STEP)
        strengths -= strengths.mean(-1, keepdims=True)
        if np.abs(step).max(initial=0) < _TOLERANCE:
            break
    return strengths


def elo(strengths: np.ndarray) -> np.ndarray:
    """Strengths in log-odds -> ratings on the Elo scale with the mean 1000."""
    return ELO_MEAN + ELO_SCALE * strengths


def bootstrap(wins: np.ndarray, samples: int, seed: int = 0) -> np.ndarray:
    """Strengths [samples, K] of draws of the prompts with replacement: votes on one prompt are not independent.

    Args:
        wins: [P, K, K], as in :func:`fit`, for each prompt.
    """
    draw = np.random.default_rng(seed)
    prompts = len(wins)
    times = draw.multinomial(prompts, np.full(prompts, 1 / prompts), size=samples)
    return fit(np.einsum("sp,pij->sij", times, wins), compared_models(wins))


def compared_models(wins: np.ndarray) -> np.ndarray:
    """bool [K, K], whether there are votes between i and j. Argument as for :func:`bootstrap`."""
    total = wins.sum(0)
    found: np.ndarray = (total + total.T) > 0
    return found


def connected_groups(compared: np.ndarray) -> list[list[int]]:
    """The models that comparisons connect, directly or through others."""
    reach = compared | np.eye(len(compared), dtype=bool)
    for _ in range(len(compared)):
        reach = (reach.astype(int) @ reach.astype(int)) > 0
    groups = {tuple(np.flatnonzero(row).tolist()) for row in reach}
    return [list(group) for group in sorted(groups)]
