"""Trains the judge on real images of the emoji world: `train(recipe, run)`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.core.method import Method, Trainable
from fewstep.emoji.classifier import ClassifierNet, EmojiClassifier, correct, labels
from fewstep.emoji.dataset import COLORS, STYLES, EmojiDataset, EmojiSpec
from fewstep.emoji.recipes import ClassifierRecipe
from fewstep.training.run_dir import RunDir
from fewstep.training.trainer import Trainer

Batch = tuple[Tensor, list[EmojiSpec]]

_HELD_OUT_SEED = 2**40  # far from the training batches' seeds, which count from the recipe's


def train(recipe: ClassifierRecipe, run: RunDir) -> EmojiClassifier:
    """Trains, measures the judge on real held-out images, and saves it to `model/` in the run's directory.

    Held out are combinations of thing, style and color in no training image, in placements of their own.
    """
    torch.manual_seed(recipe.train.seed)
    world = EmojiDataset.load(recipe.data.things)
    known, held_out = splits(world)
    net = ClassifierNet(len(world.things), recipe.width).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    trainer = Trainer(
        ClassifierTraining(net), batches(world, known, recipe), run, train=recipe.train, optim={"judge": recipe.optim}
    )
    trainer.fit()
    with trainer.ema_weights():
        card = {
            "things": [thing.code for thing in world.things],
            "names": [thing.en for thing in world.things],
            "styles": list(STYLES),
            "colors": list(COLORS),
            "width": recipe.width,
            "steps": recipe.train.steps,
            "batch_size": recipe.train.batch_size,
            "seconds": round(trainer.seconds),
        }
        trained = ClassifierNet(len(world.things), recipe.width)
        # through half precision, as it is saved: what is measured is what ships
        trained.load_state_dict({name: tensor.half().float() for name, tensor in net.state_dict().items()})
    judge = EmojiClassifier(trained, card)
    card["accuracy"] = accuracy(judge, world, held_out)
    judge.save(run.directory / "model")
    return judge


def accuracy(
    judge: EmojiClassifier, world: EmojiDataset, concepts: list[EmojiSpec], placements: int = 4
) -> dict[str, float]:
    """On real images of `concepts`, each in `placements` placements: name_top1, style_top1, color_top1, images."""
    generator = torch.Generator().manual_seed(_HELD_OUT_SEED)
    repeated = concepts * placements
    right: dict[str, list[Tensor]] = {}
    for start in range(0, len(repeated), 64):
        chunk = repeated[start : start + 64]
        for key, hit in correct(judge(world.render(chunk, generator)), chunk).items():
            right.setdefault(key, []).append(hit)
    return {key: float(torch.cat(parts).float().mean()) for key, parts in right.items()} | {"images": len(repeated)}


def splits(world: EmojiDataset) -> tuple[list[EmojiSpec], list[EmojiSpec]]:
    """Concepts, one a combination of thing, style and color: in the world's training split; held out altogether.

    An image has no language: a combination held out in one language only is a training image in the other.
    """

    def images(concepts: list[EmojiSpec]) -> dict[EmojiSpec, None]:
        return dict.fromkeys(replace(concept, language="en") for concept in concepts)

    known = images(world.concepts("train", STYLES))
    return list(known), [concept for concept in images(world.concepts("all", STYLES)) if concept not in known]


def batches(world: EmojiDataset, concepts: list[EmojiSpec], recipe: ClassifierRecipe) -> Callable[[int], Batch]:
    """Batch number -> (augmented images, their concepts), a pure function of it.

    The first half is as the concepts say. The second has backgrounds of any color and teaches the drawings alone: from
    named backgrounds only, the judge learns which of them go with which drawing (in a trial of 2,500 steps it named
    99.9% of seen combinations and 94% of unseen ones).
    """

    def batch(position: int) -> Batch:
        generator = torch.Generator().manual_seed(recipe.train.seed * 2**24 + position)
        chosen = torch.randint(len(concepts), (recipe.train.batch_size,), generator=generator).tolist()
        drawn = [concepts[index] for index in chosen]
        half = len(drawn) // 2
        images = torch.cat([world.render(drawn[:half], generator), random_backgrounds(world, drawn[half:], generator)])
        return augment(images, generator), drawn

    return batch


class ClassifierTraining(Method):
    """Plain classification: the cross entropies of drawing and color. The drawing, by far the harder, weighs more."""

    def __init__(self, net: ClassifierNet) -> None:
        self.net = net
        self.trainables = [Trainable("judge", net, self.loss)]

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        images, concepts = batch
        output = self.net(images)
        name, style, color = labels(concepts)
        named = slice(len(concepts) // 2)  # only these have a background with a name
        losses = {
            "drawing": F.cross_entropy(output.drawing_logits.flatten(1), name * len(STYLES) + style),
            "color": F.cross_entropy(output.color_logits[named], color[named]),
        }
        right = {key: hit.float().mean() for key, hit in correct(output[named], concepts[named]).items()}
        return losses["drawing"] + 0.3 * losses["color"], losses | right


def random_backgrounds(world: EmojiDataset, concepts: list[EmojiSpec], generator: torch.Generator) -> Tensor:
    """Real images of the concepts' drawings, [N,3,64,64] in [0,1], on backgrounds of random colors."""
    state = generator.get_state()
    black = world.render([replace(concept, color="black") for concept in concepts], generator)
    generator.set_state(state)
    white = world.render([replace(concept, color="white") for concept in concepts], generator)
    # The same placements twice: they differ by the background, as far as it is seen through the drawing.
    difference = (white - black).flatten(2)
    bare = difference.argmax(2, keepdim=True)
    through = difference / difference.gather(2, bare)
    drawing = black.flatten(2) - through * black.flatten(2).gather(2, bare)
    # wider than [0,1] before clamping: white, black and pure colors are the hardest, and rare inside the cube
    colors = (torch.rand(len(concepts), 3, 1, generator=generator) * 1.5 - 0.25).clamp(0, 1)
    return (drawing + through * colors).clamp(0, 1).view_as(black)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """What generators do to pictures, mildly: warps, tints, over-saturation, blur, blotches, noise. [N,3,H,W] in [0,1].

    A judge of clean images alone takes the smallest artefact for another thing; one that has seen them judges content.
    """
    count, _, height, width = images.shape

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *(shape or (1, 1, 1)), generator=generator)

    def sometimes(probability: float) -> Tensor:
        return (torch.rand(count, 1, 1, 1, generator=generator) < probability).float()

    # geometry in one resampling: rotation up to 10 degrees, scale, shift, and a smooth warp of up to a few pixels
    angle, scale = uniform(-0.17, 0.17, 1), uniform(0.92, 1.1, 1)
    affine = torch.stack(
        [
            *(scale * angle.cos(), -scale * angle.sin(), uniform(-0.08, 0.08, 1)),
            *(scale * angle.sin(), scale * angle.cos(), uniform(-0.08, 0.08, 1)),
        ],
        dim=-1,
    ).view(count, 2, 3)
    field = torch.randn(count, 2, 5, 5, generator=generator) * uniform(0, 0.05)
    field = F.interpolate(field, (height, width), mode="bicubic").permute(0, 2, 3, 1)
    grid = F.affine_grid(affine, [count, 3, height, width], align_corners=False) + field
    images = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)

    # a third each: blurred to half the resolution, mixed with that, untouched
    small = F.interpolate(F.avg_pool2d(images, 2), (height, width), mode="bilinear")
    images = torch.lerp(images, small, sometimes(0.67) * uniform(0.3, 1).clamp(max=1))

    # color: saturation, contrast, brightness, a slight tint
    grey = images.mean(1, keepdim=True)
    images = grey + (images - grey) * uniform(0.75, 1.5)
    images = 0.5 + (images - 0.5) * uniform(0.8, 1.25) + uniform(-0.06, 0.06) + uniform(-0.04, 0.04, 3, 1, 1)

    # blotches (a latent space's noise) and fine noise
    blotches = torch.randn(count, 3, height // 8, width // 8, generator=generator) * uniform(0, 0.06)
    images = images + sometimes(0.5) * F.interpolate(blotches, (height, width), mode="bilinear")
    images = images + sometimes(0.5) * uniform(0, 0.06) * torch.randn(images.shape, generator=generator)
    return images.clamp(0, 1)
