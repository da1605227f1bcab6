"""The rewards that are not of the emoji dataset."""

from fewstep.core.registry import rewards

rewards.register("python", "fewstep.rewards.python_callable:python_reward")
