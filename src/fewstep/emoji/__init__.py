"""The emoji dataset and the models trained on it: a plug-in of prompts, images, training sets,
scorers, rewards, recipes and commands.

Importing this module registers all of them by name and imports none of them: each is imported when it is first used.
"""

from pathlib import Path

from fewstep.core.registry import (
    commands,
    image_sources,
    prompt_sources,
    recipe_folders,
    recipe_kinds,
    rewards,
    scorers,
    training_sets,
)

prompt_sources.register("emoji", "fewstep.emoji.prompts:EmojiPrompts")
image_sources.register("emoji", "fewstep.emoji.images:EmojiImages")
training_sets.register("emoji-fluent", "fewstep.emoji.lora_set:write_fluent_set")
scorers.register("emoji", "fewstep.emoji.scorer:EmojiScorer")
scorers.register("nearest_real", "fewstep.emoji.nearest_real:NearestReal")
recipe_kinds.register("vae", "fewstep.emoji.recipes:VAERecipe")
recipe_kinds.register("decoder", "fewstep.emoji.recipes:DecoderRecipe")
recipe_kinds.register("text_encoder", "fewstep.emoji.recipes:TextEncoderRecipe")
recipe_kinds.register("flow_matching", "fewstep.emoji.recipes:FlowMatchingRecipe")
recipe_kinds.register("classifier", "fewstep.emoji.recipes:ClassifierRecipe")
recipe_kinds.register("reward", "fewstep.emoji.recipes:RewardRecipe")
rewards.register("emoji", "fewstep.emoji.reward:EmojiReward")
rewards.register("background", "fewstep.emoji.background_reward:BackgroundReward")
recipe_folders.register("emoji", Path(__file__).parent / "recipes")
commands.register("emoji", "fewstep.emoji.commands:app")
