"""Two rewards and a feature network under names, for the watch of trained rewards."""

import torch
from reward_setup import Quadratic

from fewstep.core.registry import feature_networks, rewards

WATCHED = {"test_dark": 2.0, "test_light": -1.0}
WATCH_FEATURES = "test_pixels"


@rewards.register("test_dark")
def dark() -> Quadratic:
    """Best where an image is black."""
    return Quadratic(0.0)


@rewards.register("test_light")
def light() -> Quadratic:
    return Quadratic(1.0)


@feature_networks.register(WATCH_FEATURES)
class PixelFeatures:
    """The mean color and its deviation: enough for distances, in no time."""

    name = WATCH_FEATURES

    def __call__(self, images, progress=None):
        pixels = images.float().flatten(1, 2) / 255
        return torch.cat([pixels.mean(1), pixels.std(1)], dim=1)
