"""Rewards, groups and cold starts in recipes."""

from bad_inputs.files import DISTILL, PROMPTS
from bad_inputs.preferences import MANY_VOTES
from bad_inputs.table import Case, Message, Section

_FILES = {"mine.yaml": DISTILL, "prompts.txt": PROMPTS}
_JOINT = "cfg_augmentation: {}, distribution_matching: {}"
_EMOJI = "rewards: [{reward: emoji}]"
_GROUPS = "-s method.group_size=2"
_ADVERSARIAL = f"{_GROUPS} -s optim.discriminator.lr=1e-3"


def _terms(terms: str, expected: str, more: str = "", files: dict[str, object] | None = None) -> Case:
    command = f"distill mine.yaml -s 'method.terms={{{_JOINT}, {terms}}}' {more}"
    return Case(command.strip(), expected, _FILES | (files or {}))  # type: ignore[operator]


SECTION = Section(
    "Rewards in recipes",
    "The terms are in the [reference of DMDR](../reference/dmdr.md), the rewards in the [guide](../guides/rewards.md).",
    (
        Message(
            "unknown reward '{name}'; known: {names}",
            "Check the spelling. A reward of your own is registered by a module in `FEWSTEP_PLUGINS`.",
            _terms("reward: {rewards: [{reward: guess}]}", "'guess'"),
        ),
        Message(
            "method.terms.{term}.rewards: {reward} has no gradient; use it in reward_weighting, grpo or surrogate, "
            "which need none",
            "ReFL, the tilt and the targets follow the reward's gradient.",
            _terms("reward: {rewards: [{reward: background}]}", "terms.reward.rewards: background has no gradient"),
            _terms("reward_tilt: {rewards: [{reward: background}]}", "terms.reward_tilt.rewards"),
            _terms("reward_targets: {rewards: [{reward: background}]}", "terms.reward_targets.rewards"),
        ),
        Message(
            "{recipe}: {key}: {problem}",
            "Values of a term of their own.",
            _terms("reward: {rewards: []}", "reward.rewards: list should have at least 1 item"),
            _terms("adversarial_grpo: {every: 0.5}", "at most one policy step is taken", _ADVERSARIAL),
            _terms("adversarial_grpo: {adversary: {depths: [0.5, 0.2]}}", "give ascending shares", _ADVERSARIAL),
            _terms(f"reward: {{{_EMOJI}, balance: 0}}", "reward.balance: input should be greater than 0"),
            _terms(f"reward: {{{_EMOJI}, at: start}}", "reward.at: input should be 'endpoint' or 'anchor'"),
            _terms(f"reward: {{{_EMOJI}, max_failures: 2}}", "reward.max_failures"),
            _terms(f"reward_tilt: {{{_EMOJI}, temperature: 0}}", "reward_tilt.temperature"),
            _terms(f"reward_targets: {{{_EMOJI}, radius: 0}}", "reward_targets.radius"),
            _terms(f"grpo: {{{_EMOJI}, eta: 0}}", "grpo.eta", _GROUPS),
            _terms(f"grpo: {{{_EMOJI}, clip: 1}}", "grpo.clip", _GROUPS),
            _terms(f"dpo: {{{_EMOJI}, beta: 0}}", "dpo.beta", _GROUPS),
        ),
        Message(
            "{recipe}: method.terms.{term} compares samples of one prompt: set method.group_size to 2 or more",
            "A group is several samples of one prompt.",
            _terms(f"grpo: {{{_EMOJI}}}", "grpo compares"),
            _terms(f"dpo: {{{_EMOJI}}}", "dpo compares"),
            _terms(f"surrogate: {{{_EMOJI}}}", "surrogate compares", "-s optim.surrogate.lr=0.01"),
            _terms(f"advantage_weighting: {{{_EMOJI}}}", "advantage_weighting compares"),
        ),
        Message(
            "{recipe}: train.batch_size {size} is not a multiple of method.group_size {group}",
            "A batch has whole groups.",
            Case("distill mine.yaml -s method.group_size=3", "batch_size 2 is not a multiple", _FILES),
        ),
        Message(
            "{recipe}: method.terms.{term}: a student of {steps} steps has {problem}",
            "Stochastic steps are those before the last.",
            _terms(f"grpo: {{{_EMOJI}}}", "too few stochastic ones", f"{_GROUPS} -s student.steps=2"),
            _terms(f"dpo: {{{_EMOJI}}}", "no stochastic step", f"{_GROUPS} -s student.steps=1"),
            _terms("dpo: {votes: votes}", "it takes 3", "-s student.steps=2", dict(MANY_VOTES)),
        ),
        Message(
            "{recipe}: method.terms.grpo.trained_steps {count}: {steps} steps have {stochastic} stochastic ones",
            "The last step is deterministic.",
            _terms(f"grpo: {{{_EMOJI}, trained_steps: 4}}", "trained_steps 4", _GROUPS),
        ),
        Message(
            "{recipe}: method.terms.grpo: without distribution_matching or kl_weight nothing keeps the student from "
            "exploiting the reward; give one of them a weight",
            "One of them is the anchor.",
            Case(
                f"distill mine.yaml -s 'method.terms={{grpo: {{{_EMOJI}}}}}' -s optim.fake_score=null {_GROUPS}",
                "nothing keeps the student",
                _FILES,
            ),
        ),
        Message(
            "{recipe}: method.terms.grpo.matching: it compares the teacher with the fake score, which "
            "distribution_matching trains; give that term a weight, small if the reward alone should match",
            "The divergence is estimated with the fake score.",
            Case(
                f"distill mine.yaml -s 'method.terms={{grpo: {{{_EMOJI}, kl_weight: 1, matching: {{}}}}}}' "
                f"-s optim.fake_score=null {_GROUPS}",
                "grpo.matching: it compares",
                _FILES,
            ),
        ),
        Message(
            "{recipe}: method.terms.dpo: give rewards, or votes (a folder of fewstep prefs collect), not both",
            "Pairs come from one of the two.",
            _terms("dpo: {}", "give rewards, or votes"),
            _terms(f"dpo: {{{_EMOJI}, votes: votes}}", "give rewards, or votes", _GROUPS),
        ),
        Message(
            "{recipe}: method.terms.dpo.voter: no effect without votes; leave it out",
            "Rewards do not vote here.",
            _terms(f"dpo: {{{_EMOJI}, voter: me}}", "voter: no effect", _GROUPS),
        ),
        Message(
            "{file}: no such file; votes come from fewstep prefs collect",
            "Check the path: it is that of the folder with `votes.jsonl`.",
            _terms("dpo: {votes: nowhere}", "nowhere/votes.jsonl"),
        ),
        Message(
            "{file}, vote {number}: its image {image} is missing",
            "Images are in the folder of the votes.",
            _terms("dpo: {votes: votes}", "is missing", files=dict(MANY_VOTES)),
        ),
        Message(
            "{recipe}: method.terms.reward.balance: neither cfg_augmentation nor distribution_matching has a weight at "
            "step {step}, where the reward starts; leave balance out, and set weight",
            "A balance is measured against their direction.",
            Case(
                f"distill mine.yaml -s 'method.terms={{reward: {{{_EMOJI}, balance: 1}}}}' -s optim.fake_score=null",
                "reward.balance: neither",
                _FILES,
            ),
        ),
        Message(
            "{recipe}: method.terms.distribution_matching.dyna_dg needs the fake score as an adapter on the teacher: "
            "set models.train: lora, or leave it out",
            "DynaDG adds the fake score's adapter to the teacher.",
            Case("distill mine.yaml -s 'method.terms.distribution_matching.dyna_dg={}'", "dyna_dg needs", _FILES),
        ),
        Message(
            "{recipe}: method.renoise.dyna_rs.steps: it must last at least 1 step; leave dyna_rs out",
            "Give a number of steps, or a share of them.",
            Case("distill mine.yaml -s method.renoise.dyna_rs.steps=0", "dyna_rs.steps", _FILES),
        ),
        Message(
            "{recipe}: method.terms: {name} is refused for distilled students: {reason}",
            "These objectives are known to make few-step students worse.",
            _terms("nft: {}", "nft is refused"),
        ),
        Message(
            "evaluate.scorers: {scorer} is trained on, which a scorer must not be; it is logged as val/reward anyway",
            "What is trained on does not measure the result.",
            _terms(
                "reward_weighting: {weight: 0.2, rewards: [{reward: background}]}",
                "background is trained on",
                "-s 'evaluate.scorers=[background]'",
            ),
        ),
    ),
)
