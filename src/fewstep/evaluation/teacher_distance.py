"""The Fréchet distance of a student's validation images to the teacher's, as a validation metric.

Of videos, the frame in the middle is measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from fewstep.atomic import write_tensors
from fewstep.data.images import middle_frame
from fewstep.evaluation.feature_networks import FeatureNetwork, with_network
from fewstep.evaluation.metrics import frechet_distance
from fewstep.inference.divided import Divided
from fewstep.inference.params import SamplingParams
from fewstep.models.pipeline import TextToImagePipeline
from fewstep.progress import log_line


def distance_name(network: str) -> str:
    """The metric's name, as in "fd_teacher[open-nsfw]"."""
    return with_network("fd_teacher", network)


class TeacherDistance:
    """Measures images against the teacher's images of the same prompts and seeds, which are sampled here, once.

    Args:
        steps: of the teacher; None is its generation config's.
        file: keeps the features of the teacher's images; None keeps them in memory.
        divided: the processes that make the teacher's images.
    """

    def __init__(
        self,
        teacher: TextToImagePipeline,
        prompts: Sequence[str],
        network: FeatureNetwork,
        steps: int | None = None,
        file: Path | None = None,
        divided: Divided | None = None,
    ) -> None:
        self.network = network
        if file is not None and file.exists():
            self.features = load_file(file)["features"]
            return
        log_line(f"the teacher's images of {len(prompts)} validation prompts, once")
        images = middle_frame((divided or Divided()).generate(teacher, prompts, SamplingParams(steps=steps)))
        self.features = network(images)
        if file is not None:
            write_tensors(file, {"features": self.features})

    def __call__(self, images: Tensor) -> dict[str, float]:
        """images: uint8 [N, H, W, 3] of the same prompts."""
        return self.of_features(self.network(images))

    def of_features(self, features: Tensor) -> dict[str, float]:
        """features: [N, D], of images of the same prompts."""
        return {distance_name(self.network.name): frechet_distance(features, self.features)}
