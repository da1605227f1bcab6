"""The Fréchet distance of a student's validation images to the teacher's, as a validation metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from fewstep.atomic import write_tensors
from fewstep.evaluation.feature_networks import FeatureNetwork, with_network
from fewstep.evaluation.metrics import frechet_distance
from fewstep.inference.generate import generate
from fewstep.models.pipeline import TextToImagePipeline
from fewstep.progress import log_line


def distance_name(network: str) -> str:
    """The metric's name, as in "fd_teacher[open-nsfw]"."""
    return with_network("fd_teacher", network)


class TeacherDistance:
    """Measures images against the teacher's images of the same prompts, which it samples once, as the teacher's
    generation config has them.

    Args:
        file: keeps the features of the teacher's images.
    """

    def __init__(
        self, teacher: TextToImagePipeline, prompts: Sequence[str], network: FeatureNetwork, file: Path
    ) -> None:
        self.network = network
        if not file.exists():
            log_line(f"the teacher's images of {len(prompts)} validation prompts, once")
            write_tensors(file, {"features": network(generate(teacher, prompts).images)})
        self.features = load_file(file)["features"]

    def __call__(self, images: Tensor) -> Mapping[str, float]:
        """images: uint8 [N, H, W, 3] of the same prompts."""
        return {distance_name(self.network.name): frechet_distance(self.network(images), self.features)}
