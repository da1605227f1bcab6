"""A small classifier of emoji images: their object, style and background. It evaluates and is never a reward.

It is trained on real images of all three styles (train_classifier.py), never on generated ones. Its accuracy on real
held-out images is stored with its weights and shown in every report that uses it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fewstep.atomic import write_tensors, write_text
from fewstep.emoji.dataset import BACKGROUNDS, STYLES, EmojiDataset, EmojiSpec
from fewstep.errors import UserError
from fewstep.evaluation.images import as_float

BUNDLED_CLASSIFIER = Path(__file__).parent.parent / "assets" / "classifier"
SIZE = 64  # pixels per side; other sizes are resized to it
ACCURACIES = ("object_acc", "style_acc", "background_acc")


@dataclass(frozen=True)
class ClassifierOutput:
    """Predictions for N images.

    Attributes:
        object_style_logits: [N, objects, styles].
        background_logits: [N, backgrounds].
        none_logit: [N], that of the class "none of these objects".
        embedding: [N, E], the input of both linear heads.
    """

    object_style_logits: Tensor
    background_logits: Tensor
    none_logit: Tensor
    embedding: Tensor

    @property
    def none(self) -> Tensor:
        """Whether no object is recognizable: bool [N]."""
        return self.none_logit > self.object_logits.amax(1)

    @property
    def object_logits(self) -> Tensor:
        """[N, objects], marginalized over styles."""
        return self.object_style_logits.logsumexp(2)

    @property
    def style_logits(self) -> Tensor:
        """[N, styles], marginalized over objects."""
        return self.object_style_logits.logsumexp(1)

    def __getitem__(self, rows: list[int] | slice) -> ClassifierOutput:
        return ClassifierOutput(
            *(self.object_style_logits[rows], self.background_logits[rows]),
            *(self.none_logit[rows], self.embedding[rows]),
        )


class ClassifierNet(nn.Module):
    """A pre-activation residual network (He et al. 2016b) with group norm.

    About 35 MFLOP per image at 16 base channels.

    Group norm, not batch norm: a prediction does not depend on the other images of the batch. The stem and the residual
    path have no normalization, so that absolute color reaches the heads. Object and style share one softmax over all
    their combinations, since the style is only recognizable given the object. One more class is "none of these", for
    images in which no object is recognizable.
    """

    def __init__(self, num_objects: int, base_channels: int = 16) -> None:
        super().__init__()
        channels = base_channels
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1)]
        for _ in range(3):
            layers += [nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1), _Residual(2 * channels)]
            channels *= 2
        self.body = nn.Sequential(*layers)
        self.norm = nn.LayerNorm(channels)
        self.object_style = nn.Linear(channels, num_objects * len(STYLES) + 1)
        self.background = nn.Linear(channels, len(BACKGROUNDS))

    def forward(self, images: Tensor) -> ClassifierOutput:
        """images [N, 3, 64, 64] in [0, 1]."""
        activations = self.body((images * 2 - 1).contiguous(memory_format=torch.channels_last))
        embedding = self.norm(activations.mean((2, 3)))
        logits = self.object_style(embedding)
        object_style = logits[:, :-1].unflatten(1, (-1, len(STYLES)))
        return ClassifierOutput(object_style, self.background(embedding), logits[:, -1], embedding)


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(8, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(8, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.relu(self.norm1(x)))
        return x + self.conv2(F.relu(self.norm2(hidden)))


class EmojiClassifier:
    """A trained network with its description.

    Attributes:
        description: `objects` (Unicode codes, in label order), `styles`, `backgrounds`, `base_channels`, `accuracy` (on
            real held-out images) and how it was trained.
    """

    def __init__(self, net: ClassifierNet, description: dict[str, Any]) -> None:
        self.net = net.eval().requires_grad_(False)
        self.description = description

    @property
    def accuracy(self) -> dict[str, float]:
        """On real held-out images: object_acc, style_acc, background_acc, and images, the number of these."""
        return self.description["accuracy"]

    @torch.no_grad()
    def __call__(self, images: Tensor, batch_size: int = 64) -> ClassifierOutput:
        """images: uint8 [N, H, W, 3] or float [N, 3, H, W] in [0, 1], of any size and on any device. The output is on
        the CPU."""
        device = next(self.net.parameters()).device
        outputs = []
        for start in range(0, max(1, len(images)), batch_size):
            pixels = as_float(images[start : start + batch_size].to(device))
            if pixels.shape[-2:] != (SIZE, SIZE):
                pixels = F.interpolate(pixels, (SIZE, SIZE), mode="bilinear", antialias=True)
            outputs.append(self.net(pixels))
        return ClassifierOutput(
            torch.cat([o.object_style_logits for o in outputs]).cpu(),
            torch.cat([o.background_logits for o in outputs]).cpu(),
            torch.cat([o.none_logit for o in outputs]).cpu(),
            torch.cat([o.embedding for o in outputs]).cpu(),
        )

    @classmethod
    def load(cls, path: str | Path | None = None) -> EmojiClassifier:
        """Load a folder with classifier.safetensors and classifier.json; the bundled classifier by default.

        Raises:
            UserError: a file is missing or damaged; the message names it.
        """
        folder = Path(path) if path is not None else BUNDLED_CLASSIFIER
        weights, description = folder / "classifier.safetensors", folder / "classifier.json"
        for file in (weights, description):
            if not file.is_file():
                raise UserError(f"{file} is missing: train a classifier with `fewstep emoji train classifier`")
        try:
            fields = json.loads(description.read_text(encoding="utf-8"))
            net = ClassifierNet(len(fields["objects"]), fields["base_channels"])
            net.load_state_dict({name: tensor.float() for name, tensor in load_file(weights).items()})
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{description} does not describe a classifier ({error})") from None
        except (SafetensorError, RuntimeError) as error:
            message = str(error).splitlines()[0]
            raise UserError(f"{weights} does not hold the weights of this classifier ({message})") from None
        return cls(net, fields)

    def save(self, folder: str | Path) -> None:
        """Write classifier.safetensors (fp16) and classifier.json into `folder`; files are replaced atomically."""
        folder = Path(folder)
        weights = {name: tensor.half().contiguous() for name, tensor in self.net.state_dict().items()}
        write_tensors(folder / "classifier.safetensors", weights)
        text = json.dumps(self.description, ensure_ascii=False, indent=1) + "\n"
        write_text(folder / "classifier.json", text)

    def check_objects(self, dataset: EmojiDataset) -> None:
        """Raises: UserError unless the labels are the objects of the dataset, in the same order."""
        codes = [item.code for item in dataset.objects]
        if codes != self.description["objects"]:
            raise UserError(
                f"the classifier was trained on {len(self.description['objects'])} objects, and not on the "
                f"{len(codes)} objects of this dataset in this order: train one with `fewstep emoji train classifier`"
            )


def labels(specs: Sequence[EmojiSpec]) -> tuple[Tensor, Tensor, Tensor]:
    """Indices [N] of object, style and background."""
    backgrounds = list(BACKGROUNDS)
    return (
        torch.tensor([s.object for s in specs], dtype=torch.long),
        torch.tensor([STYLES.index(s.style) for s in specs], dtype=torch.long),
        torch.tensor([backgrounds.index(s.background) for s in specs], dtype=torch.long),
    )


def correct(output: ClassifierOutput, specs: Sequence[EmojiSpec]) -> dict[str, Tensor]:
    """Whether each top-1 prediction is right: bool [N] for object_acc, style_acc and background_acc. The object and the
    style are wrong where the prediction is "none of these"."""
    logits = (output.object_logits, output.style_logits, output.background_logits)
    right = {
        key: prediction.argmax(1) == label
        for key, prediction, label in zip(ACCURACIES, logits, labels(specs), strict=True)
    }
    return right | {key: right[key] & ~output.none for key in ("object_acc", "style_acc")}
