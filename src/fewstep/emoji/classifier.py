"""The judge: a small classifier of what an emoji image shows. It only evaluates; it is never a reward.

Trained on real composed images of all three styles (train_judge.py), so that no model under evaluation has a say in it.
Its own accuracy on real held-out images travels with its weights and stands in every report it signs.
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
from safetensors.torch import load_file, save
from torch import Tensor, nn

from fewstep.emoji.dataset import COLORS, STYLES, EmojiDataset, EmojiSpec
from fewstep.errors import UserError
from fewstep.evaluation.images import as_float

BUNDLED_CLASSIFIER = Path(__file__).parent.parent / "assets" / "judge"
SIZE = 64  # pixels a side; other sizes are resized to it


@dataclass(frozen=True)
class ClassifierOutput:
    """What the judge sees in N images.

    drawing_logits [N, things, styles], color_logits [N, colors], embedding [N, E] that both are read from.
    """

    drawing_logits: Tensor
    color_logits: Tensor
    embedding: Tensor

    @property
    def name_logits(self) -> Tensor:
        """[N, things], whatever the style."""
        return self.drawing_logits.logsumexp(2)

    @property
    def style_logits(self) -> Tensor:
        """[N, styles], whatever the thing."""
        return self.drawing_logits.logsumexp(1)

    def __getitem__(self, rows: list[int] | slice) -> ClassifierOutput:
        return ClassifierOutput(self.drawing_logits[rows], self.color_logits[rows], self.embedding[rows])


class ClassifierNet(nn.Module):
    """A pre-activation residual network (He et al. 2016b) with group norm: about 35 MFLOP an image at width 16.

    Group norm, not batch norm: an image is judged the same whoever shares its batch. The stem has none before it, the
    residual path none on it, so that absolute color reaches the heads. Name and style are read off one softmax over
    all drawings, things x styles: which style it is can be told only with which thing it is in mind.
    """

    def __init__(self, things: int, width: int = 16) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1)]
        for _ in range(3):
            layers += [nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), _Residual(2 * width)]
            width *= 2
        self.body = nn.Sequential(*layers)
        self.norm = nn.LayerNorm(width)
        self.drawing = nn.Linear(width, things * len(STYLES))
        self.color = nn.Linear(width, len(COLORS))

    def forward(self, images: Tensor) -> ClassifierOutput:
        """images [N,3,64,64] in [0,1]."""
        activations = self.body((images * 2 - 1).contiguous(memory_format=torch.channels_last))
        embedding = self.norm(activations.mean((2, 3)))
        drawing = self.drawing(embedding).unflatten(1, (-1, len(STYLES)))
        return ClassifierOutput(drawing, self.color(embedding), embedding)


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
    """A trained network with what it knows about itself.

    card: `things` (Unicode codes, in label order), `styles`, `colors`, `width`, `accuracy` (its own, on real held-out
    images) and how it was trained.
    """

    def __init__(self, net: ClassifierNet, card: dict[str, Any]) -> None:
        self.net = net.eval().requires_grad_(False)
        self.card = card

    @property
    def accuracy(self) -> dict[str, float]:
        """Its own on real held-out images: name_top1, style_top1, color_top1, images."""
        return self.card["accuracy"]

    @torch.no_grad()
    def __call__(self, images: Tensor, batch_size: int = 64) -> ClassifierOutput:
        """uint8 [N,H,W,3] or float [N,3,H,W] in [0,1], of any size."""
        outputs = []
        for start in range(0, max(1, len(images)), batch_size):
            pixels = as_float(images[start : start + batch_size])
            if pixels.shape[-2:] != (SIZE, SIZE):
                pixels = F.interpolate(pixels, (SIZE, SIZE), mode="bilinear", antialias=True)
            outputs.append(self.net(pixels))
        return ClassifierOutput(
            torch.cat([o.drawing_logits for o in outputs]),
            torch.cat([o.color_logits for o in outputs]),
            torch.cat([o.embedding for o in outputs]),
        )

    @classmethod
    def load(cls, path: str | Path | None = None) -> EmojiClassifier:
        """From a folder with judge.safetensors and judge.json; the shipped judge by default.

        Raises: UserError if a file is missing or broken, naming it.
        """
        folder = Path(path) if path is not None else BUNDLED_CLASSIFIER
        weights, description = folder / "judge.safetensors", folder / "judge.json"
        for file in (weights, description):
            if not file.is_file():
                raise UserError(f"{file} is missing: train a judge with `fewstep train recipes/judge.yaml`")
        try:
            card = json.loads(description.read_text(encoding="utf-8"))
            net = ClassifierNet(len(card["things"]), card["width"])
            net.load_state_dict({name: tensor.float() for name, tensor in load_file(weights).items()})
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{description} is not a judge's description ({error})") from None
        except (SafetensorError, RuntimeError) as error:
            raise UserError(f"{weights} does not hold this judge's weights ({str(error).splitlines()[0]})") from None
        return cls(net, card)

    def save(self, folder: str | Path) -> None:
        """Writes judge.safetensors (fp16) and judge.json into `folder`, replacing files only once they are whole."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: tensor.half().contiguous() for name, tensor in self.net.state_dict().items()}
        (folder / "judge.safetensors.partial").write_bytes(save(weights))
        (folder / "judge.safetensors.partial").replace(folder / "judge.safetensors")
        text = json.dumps(self.card, ensure_ascii=False, indent=1) + "\n"
        (folder / "judge.json.partial").write_text(text, encoding="utf-8")
        (folder / "judge.json.partial").replace(folder / "judge.json")

    def check_world(self, world: EmojiDataset) -> None:
        """Raises: UserError unless the labels are the world's things, in its order."""
        codes = [thing.code for thing in world.things]
        if codes != self.card["things"]:
            raise UserError(
                f"the judge knows {len(self.card['things'])} things, and not the {len(codes)} of this world in this "
                "order: train one with `fewstep train recipes/judge.yaml`"
            )


def labels(concepts: Sequence[EmojiSpec]) -> tuple[Tensor, Tensor, Tensor]:
    """Indices [N] of name, style and color."""
    colors = list(COLORS)
    return (
        torch.tensor([c.thing for c in concepts], dtype=torch.long),
        torch.tensor([STYLES.index(c.style) for c in concepts], dtype=torch.long),
        torch.tensor([colors.index(c.color) for c in concepts], dtype=torch.long),
    )


def correct(output: ClassifierOutput, concepts: Sequence[EmojiSpec]) -> dict[str, Tensor]:
    """Bool [N] for each of name_top1 (among all names), style_top1, color_top1."""
    name, style, color = labels(concepts)
    return {
        "name_top1": output.name_logits.argmax(1) == name,
        "style_top1": output.style_logits.argmax(1) == style,
        "color_top1": output.color_logits.argmax(1) == color,
    }
