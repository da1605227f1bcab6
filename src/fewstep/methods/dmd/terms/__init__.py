"""The loss terms, one class each; importing this package registers them, in the order in which they are computed."""

from fewstep.methods.dmd.terms import advantage_weighting as _advantage_weighting
from fewstep.methods.dmd.terms import adversarial_grpo as _adversarial_grpo
from fewstep.methods.dmd.terms import adversarial_surrogate as _adversarial_surrogate
from fewstep.methods.dmd.terms import cfg_augmentation as _ca
from fewstep.methods.dmd.terms import distribution_matching as _dm
from fewstep.methods.dmd.terms import dpo as _dpo
from fewstep.methods.dmd.terms import gan as _gan
from fewstep.methods.dmd.terms import grpo as _grpo
from fewstep.methods.dmd.terms import mean_variance as _mean_variance
from fewstep.methods.dmd.terms import mmd as _mmd
from fewstep.methods.dmd.terms import reward as _reward
from fewstep.methods.dmd.terms import reward_targets as _reward_targets
from fewstep.methods.dmd.terms import reward_tilt as _reward_tilt
from fewstep.methods.dmd.terms import reward_weighting as _reward_weighting
from fewstep.methods.dmd.terms import surrogate as _surrogate
from fewstep.methods.dmd.terms import trajectory_mse as _trajectory_mse

__all__ = [
    "_advantage_weighting",
    "_adversarial_grpo",
    "_adversarial_surrogate",
    "_ca",
    "_dm",
    "_dpo",
    "_gan",
    "_grpo",
    "_mean_variance",
    "_mmd",
    "_reward",
    "_reward_targets",
    "_reward_tilt",
    "_reward_weighting",
    "_surrogate",
    "_trajectory_mse",
]
