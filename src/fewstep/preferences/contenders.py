"""The models that are compared, each with its sampling parameters: "[LABEL=]MODEL[@KEY=VALUE,...]"."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fewstep.config.base import NAME
from fewstep.errors import UserError
from fewstep.inference.params import SamplingParams, parse_params
from fewstep.models.components import resolve_model
from fewstep.models.generation_config import load_generation_config

#: Sampling parameters that models of a comparison may differ in; another seed compares a model with itself.
SETTINGS = (
    *("seed", "steps", "guidance_scale", "negative_prompt", "system_prompt", "cfg_normalization", "cfg_truncation"),
    *("height", "width", "frames", "sampler", "eta"),
)
_LABEL = re.compile(r"[A-Za-z0-9][\w.@=,+-]{0,99}")  # the name of a folder too
#: Names of a model's folder in a run, whose own name says more.
_IN_A_RUN = ("student", "model")


@dataclass(frozen=True)
class Contender:
    """A model with sampling parameters.

    Attributes:
        label: its name in votes and ratings, and of the folder of its images.
        model: as the user wrote it.
        folder: of the model.
        steps: sampling steps, the model's own where the parameters name none.
    """

    label: str
    model: str
    folder: Path
    params: SamplingParams
    steps: int


def parse_contenders(specs: Sequence[str], seed: int = 0, steps: int | None = None) -> list[Contender]:
    """The models of a comparison.

    Args:
        specs: as in "micro", "runs/a/student", "few=micro@steps=4,guidance_scale=0". Without a label, it is the name of
            the model's folder, or of its run, with the settings.
        seed: of the first image, of all models that name none.
        steps: of all models that name none; None is each one's own.

    Raises:
        UserError: fewer than two, two of one label, no such model, or a setting that it cannot take.
    """
    if len(specs) < 2:
        raise UserError(f"a comparison needs at least 2 models, got {len(specs)}; one model can be given twice with "
                        "other settings, as in micro micro@steps=4")  # fmt: skip
    found: dict[str, Contender] = {}
    for spec in specs:
        one = _parse(spec, seed, steps)
        if one.label.casefold() in found:
            raise UserError(f"{spec}: another model has the label {one.label}; give it one, as in LABEL={spec}")
        found[one.label.casefold()] = one
    return list(found.values())


def _parse(spec: str, seed: int, steps: int | None) -> Contender:
    named, options = spec, ""
    head, at, tail = spec.rpartition("@")
    if at and "=" in tail and "/" not in tail:
        named, options = head, tail
    label, equals, model = named.partition("=")
    if not equals or not re.fullmatch(NAME, label):
        label, model = "", named
    given: dict[str, object] = {} if steps is None else {"steps": steps}
    for option in options.split(",") if options else []:
        key, equals, value = option.partition("=")
        if not equals:
            raise UserError(f"{spec}: {option!r} is no setting; write KEY=VALUE, as in micro@steps=4,guidance_scale=0")
        if key in SamplingParams.model_fields and key not in SETTINGS:
            raise UserError(f"{spec}: {key} cannot differ between models; it may be one of {', '.join(SETTINGS)}")
        given[key] = value
    label = label or _default_label(model) + (f"@{options}" if options else "")
    if not _LABEL.fullmatch(label):
        raise UserError(f"{spec}: {label!r} cannot be the name of a folder; give a label, as in NAME={spec}")
    folder = resolve_model(model)
    try:
        params = parse_params({"seed": seed, **given})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # generation gives them again
            resolved = params.resolved(load_generation_config(folder))
    except UserError as error:
        raise UserError(f"{spec}: {error}") from None
    return Contender(label, model, folder, params, resolved.steps)


def _default_label(model: str) -> str:
    path = Path(model).expanduser()
    if path.name in _IN_A_RUN and path.parent.name:
        return path.parent.name
    return path.name
