"""The student's noise levels."""

from __future__ import annotations

from itertools import pairwise

from fewstep.config.recipe import DistillRecipe
from fewstep.core import flow
from fewstep.errors import UserError


def student_timesteps(recipe: DistillRecipe) -> list[float]:
    """The student's pre-shift levels: the recipe's own, or evenly spaced.

    Raises:
        UserError: they do not start at 1 and fall, or are not as many as the steps.
    """
    anchors = recipe.student.anchors
    if anchors is None:
        return flow.uniform_timesteps(recipe.student.steps)
    falling = all(a > b > 0 for a, b in pairwise(anchors))
    if len(anchors) != recipe.student.steps or anchors[0] != 1 or not falling:
        raise UserError(f"student.anchors {anchors}: give student.steps levels that start at 1 and fall, without the 0")
    return anchors
