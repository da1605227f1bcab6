"""The rewards that are not of the emoji dataset."""

from fewstep.core.registry import rewards

rewards.register("python", "fewstep.rewards.python_callable:python_reward")
rewards.register("clip", "fewstep.rewards.clip_rewards:ClipReward")
rewards.register("pickscore", "fewstep.rewards.clip_rewards:PickScore")
rewards.register("hpsv2", "fewstep.rewards.clip_rewards:HPSv2")
rewards.register("imagereward", "fewstep.rewards.image_reward:ImageReward")
rewards.register("aesthetic", "fewstep.rewards.aesthetic:AestheticReward")
rewards.register("srpo", "fewstep.rewards.srpo:srpo_reward")
rewards.register("ocr", "fewstep.rewards.ocr:OCRReward")
rewards.register("judge", "fewstep.rewards.endpoint:EndpointReward")
