"""Human feedback: votes between images of several models, ratings of the models, and a reward learned from the votes.

Importing this module registers the reward by name and imports nothing else.
"""

from fewstep.core.registry import rewards

rewards.register("preference", "fewstep.preferences.reward:PreferenceReward")
