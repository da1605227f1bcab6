"""The arms of benchmarks/dmdr.py: what each one trains on, from which cold start, and its learning rate."""

from __future__ import annotations

from dataclasses import dataclass

#: Learning rates of the student that tuning compares, relative to the arm's own.
FACTORS = (1 / 3, 1.0, 3.0)

REWARD = "rewards: [{reward: emoji}]"
CA, DM = "cfg_augmentation: {guidance_scale: 1.5}", "distribution_matching: {}"
JOINT = f"{CA}, {DM}, reward: {{{REWARD}, at: endpoint, balance: 1.0}}"
GROUPS = ("method.group_size=4",)
NO_FAKE_SCORE = ("optim.fake_score=null",)
LORA = ("models.train=lora", "models.rank=32", "optim.fake_score.lr=2.0e-3")

#: Cold start -> overrides of micro-turbo; STEPS is the length of a schedule. Equal ones are shared by their arms.
COLD_STARTS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "DynaRS": ("method.renoise.dyna_rs={a: 4, b: 1.5, steps: STEPS}",),
    "LoRA": (*LORA, "optim.student.lr=1.5e-3"),
    "DynaDG": (
        *(*LORA, "optim.student.lr=1.5e-3"),
        "method.terms.distribution_matching.dyna_dg={scale: 0.5, steps: STEPS}",
    ),
}


@dataclass(frozen=True)
class Arm:
    """What follows a cold start.

    Attributes:
        terms: of the student's objective, without the outer braces.
        cold_start: None trains from the teacher, for the time of a cold start longer.
        lr: the student's.
        changes: further overrides of micro-dmdr.
    """

    terms: str
    cold_start: str | None = "plain"
    lr: float = 1.0e-4
    changes: tuple[str, ...] = ()

    @property
    def overrides(self) -> list[str]:
        """Those of the recipe micro-dmdr, without the learning rate."""
        return [f"method.terms={{{self.terms}}}", *self.changes]


#: Weights are those of the papers where they give them (docs/reference/dmdr.md), and otherwise untuned.
ARMS: dict[str, Arm] = {
    "distillation only": Arm(f"{CA}, {DM}"),
    "RL only": Arm(f"reward: {{{REWARD}}}", cold_start=None, changes=NO_FAKE_SCORE),
    "DMD then RL": Arm(f"reward: {{{REWARD}}}", changes=NO_FAKE_SCORE),
    "joint, endpoint": Arm(JOINT),
    "joint, anchor": Arm(JOINT.replace("at: endpoint", "at: anchor")),
    "joint, DynaRS": Arm(JOINT, "DynaRS"),
    "joint, LoRA": Arm(JOINT, "LoRA", lr=5.0e-4, changes=LORA),
    "joint, LoRA, DynaDG": Arm(JOINT, "DynaDG", lr=5.0e-4, changes=LORA),
    "reward-tilted": Arm(f"{CA}, {DM}, reward_tilt: {{{REWARD}, temperature: 0.1}}"),
    "reward-weighted": Arm(
        f"{CA}, {DM}, reward_weighting: {{{REWARD}, weight: {{kind: linear, start: 0, end: 0.25, last_step: 50}}}}"
    ),
    "surrogate": Arm(
        f"{CA}, {DM}, surrogate: {{{REWARD}}}",
        changes=(*GROUPS, "optim.surrogate={lr: 4.0e-4, betas: [0.0, 0.99]}"),
    ),
    "GRPO, DM": Arm(f"{CA}, {DM}, grpo: {{{REWARD}}}", changes=GROUPS),
    "GRPO, KL": Arm(f"grpo: {{{REWARD}, kl_weight: 0.1}}", changes=(*GROUPS, *NO_FAKE_SCORE)),
    "GRPO, DMD as reward": Arm(
        f"distribution_matching: {{weight: 1.0e-3}}, grpo: {{{REWARD}, matching: {{weight: 10}}}}", changes=GROUPS
    ),
    "on-policy targets": Arm(f"{CA}, {DM}, reward_targets: {{{REWARD}}}"),
    "DPO": Arm(f"{CA}, {DM}, dpo: {{{REWARD}}}", changes=GROUPS),
}
