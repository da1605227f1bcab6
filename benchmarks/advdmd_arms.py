"""The arms of benchmarks/advdmd.py: the students that they start from, and what each one trains on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dmdr_arms import GROUPS, REWARD

STEPS = (4, 2, 1)
ADVERSARY = "optim.discriminator={lr: 3.0e-3, betas: [0.9, 0.99]}"

#: Constant learning rates: an arm's training has no known end.
CONSTANT = ("optim.student.lr_schedule=constant", "optim.student.min_lr_ratio=0")


@dataclass(frozen=True)
class Start:
    """A student that all arms of a number of steps start from.

    Attributes:
        recipe: None is the bundled 4-step student.
        parent: number of steps of the student that this one is trained from; None is the teacher.
        minutes: relative to those of a start.
    """

    recipe: str | None = None
    parent: int | None = None
    minutes: float = 1.0
    overrides: tuple[str, ...] = ()


STARTS = {
    4: Start(),
    2: Start("micro-2", 4, 1.0, (*CONSTANT, "method.terms.cfg_augmentation.guidance_scale=1.5")),
    # by trajectories alone: Decoupled-DMD alone makes a poor 1-step student (docs/lab-notes/students.md)
    1: Start("micro-1", None, 2.0, (*CONSTANT, "method={name: trajectory}", "optim.fake_score=null")),
}


MATCHING = "cfg_augmentation: {guidance_scale: 1.5}, distribution_matching: {}"


def distillation(steps: int) -> str:
    """The terms of Decoupled-DMD; one step keeps its trajectories as a regularizer, with the weight of micro-1."""
    return MATCHING + (", trajectory_mse: {weight: 6.0}" if steps == 1 else "")


def adversary(steps: int) -> list[str]:
    """A discriminator of emoji images; at one step of the teacher's, which the regularizer needs."""
    return [f"method.real_source={'teacher' if steps == 1 else 'emoji'}", ADVERSARY]


def decoupled(steps: int) -> list[str]:
    return [f"method.terms={{{distillation(steps)}}}"]


def gan(steps: int) -> list[str]:
    return [f"method.terms={{{distillation(steps)}, gan: {{weight: 0.3}}}}", *adversary(steps)]


def gan_heads(steps: int) -> list[str]:
    """The heads of AdvDMD's discriminator as a GAN at low noise levels, chosen on validation prompts for 1 step; no
    trajectories, so that emoji images can be the real samples at 1 step too."""
    found = "gan: {weight: 1.0, sigma_max: 0.3, depths: [0.25, 0.5, 0.75]}"
    return [f"method.terms={{{MATCHING}, {found}}}", "method.real_source=emoji", ADVERSARY]


def dmd2(steps: int) -> list[str]:
    return [*gan(steps), "method.renoise.schedule=shared", "method.fake_score_updates=5"]


def dmdr(steps: int) -> list[str]:
    reward = f"reward: {{{REWARD}, at: endpoint, balance: 1.0}}"
    return [f"method.terms={{{distillation(steps)}, {reward}}}"]


def adversarial(term: str, settings: str) -> Callable[[int], list[str]]:
    """AdvDMD's settings for runs of few steps: the gate opens by the newest 16 to 48 held-out pairs."""
    gate = "adversary: {pretraining: 10, window: 48, least_pairs: 16, final_share: 0.75}"

    def overrides(steps: int) -> list[str]:
        trained = ", trained_steps: 1" if steps == 2 and term == "adversarial_grpo" else ""
        return [
            f"student={{steps: {steps}, sampler: sde, eta: 0.9}}",
            f"method.terms={{{distillation(steps)}, {term}: {{{settings}{trained}, {gate}}}}}",
            *GROUPS,
            *adversary(steps),
        ]

    return overrides


GRPO = adversarial("adversarial_grpo", "weight: 0.1, every: {kind: piecewise, values: {0: 2, 20: 1}}")
SURROGATE_LR = "optim.surrogate={lr: 4.0e-4, betas: [0.0, 0.99]}"


def surrogate(steps: int) -> list[str]:
    return [*adversarial("adversarial_surrogate", "weight: 1.0")(steps), SURROGATE_LR]


@dataclass(frozen=True)
class Arm:
    """
    overrides: number of steps -> overrides of micro-dmdr.
    steps: the students that it can train; a policy needs a stochastic step, which a 1-step student does not have.
    """

    overrides: Callable[[int], list[str]]
    steps: tuple[int, ...] = STEPS


ARMS = {
    "Decoupled-DMD": Arm(decoupled),
    "DMD2": Arm(dmd2),
    "DMDR": Arm(dmdr),
    "AdvDMD": Arm(GRPO, (4, 2)),
    "AdvDMD, surrogate": Arm(surrogate, (4, 2)),
    "Decoupled-DMD + GAN": Arm(gan),
    "Decoupled-DMD + GAN heads": Arm(gan_heads),
}
