"""What evaluation registers: feature networks, and the scorers that need a checkpoint."""

from fewstep.core.registry import feature_networks, scorers

feature_networks.register("open-nsfw", "fewstep.evaluation.recent_features:open_nsfw")
feature_networks.register("clip", "fewstep.evaluation.transformers_features:clip_features")
feature_networks.register("dinov2", "fewstep.evaluation.transformers_features:dinov2_features")
feature_networks.register("inception", "fewstep.evaluation.transformers_features:inception_features")
scorers.register("clip_score", "fewstep.rewards.clip_score:CLIPScore")
