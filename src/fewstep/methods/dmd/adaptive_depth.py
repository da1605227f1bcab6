"""The number of steps that each training prompt needs, predicted by the chooser of an earlier student."""

from __future__ import annotations

import torch

from fewstep.config.recipe import DistillRecipe
from fewstep.core.batching import batched
from fewstep.data.encodable_texts import EncodableTexts
from fewstep.data.step_depth import StepDepth
from fewstep.data.text_prompts import PART
from fewstep.data.trajectories import template_hash
from fewstep.errors import UserError
from fewstep.inference.step_chooser import STEP_CHOOSER, StepChooser, pooled
from fewstep.models.components import resolve_model
from fewstep.models.text import PromptEncoder


def step_depth(recipe: DistillRecipe, encoder: PromptEncoder, texts: EncodableTexts) -> StepDepth:
    """The depth of a recipe with ``student.step_chooser``; all prompts are encoded.

    Raises:
        UserError: there is no such chooser, or it is for other numbers of steps or another text encoder.
    """
    name, counts = recipe.student.step_chooser, recipe.student.step_counts
    assert name is not None
    assert counts is not None
    chooser = StepChooser.load(resolve_model(name))
    if chooser is None:
        raise UserError(f"student.step_chooser: {name} has no {STEP_CHOOSER}; make it with fewstep steps train")
    if sorted(set(counts)) != list(chooser.counts):
        theirs = ", ".join(map(str, chooser.counts))
        raise UserError(
            f"student.step_chooser: {name} chooses among {theirs} steps, student.step_counts are others; make it "
            f"again with fewstep steps train --counts {','.join(map(str, sorted(set(counts))))}"
        )
    if chooser.made_by != template_hash(encoder):
        raise UserError(
            f"student.step_chooser: {name} is for another text encoder or prompt template than the teacher's; make it "
            "again with fewstep steps train"
        )
    rows = range(len(texts))
    needed = [chooser.choose(pooled(texts.encoded(rows[part]))) for part in batched(len(texts), PART)]
    return StepDepth(counts, torch.tensor([count for part in needed for count in part]))
