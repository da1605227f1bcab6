"""What a reward can gain at the most by choice: the best of several seeds by the reward, beside the mean and the ideal.

    python benchmarks/best_of_seeds.py --model micro-turbo --seeds 4 --prompts 250

Of each validation prompt images of several seeds are made. "chosen by" is the accuracy of the seed that a measure
prefers; "told apart" is the share of pairs of one prompt, one right and one wrong by nearest real, in which it prefers
the right one: 50% is chance. The measures are the reward, the reward's image features beside those of the real image,
the distance to the real image's pixels, and high-frequency energy. Real images are those of the dataset, centered.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from fewstep.config.sections import PromptSettings
from fewstep.data.prompts import open_prompts
from fewstep.emoji.dataset import EmojiDataset
from fewstep.emoji.nearest_real import NearestReal
from fewstep.emoji.reward import EmojiReward, resized
from fewstep.emoji.scorer import EmojiScorer
from fewstep.evaluation import metrics as measure
from fewstep.evaluation.images import as_float
from fewstep.inference.generate import generate
from fewstep.inference.params import SamplingParams
from fewstep.models.pipeline import load


def told_apart(scores: Tensor, right: Tensor) -> float:
    """The share of pairs of one prompt, one right and one wrong, in which the right one scores higher.

    Args:
        scores, right: [seeds, prompts].
    """
    higher = scores[:, None] > scores[None]
    pairs = (right[:, None] == 1) & (right[None] == 0)
    return float(higher[pairs].float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="micro-turbo")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=250)
    options = parser.parse_args()
    prompts = list(open_prompts(PromptSettings()).texts("validation")[: options.prompts])
    model, reward, dataset = load(options.model), EmojiReward(), EmojiDataset.load()
    made = [generate(model, prompts, SamplingParams(seed=1000 * seed)).images for seed in range(options.seeds)]
    nearest, scorer = NearestReal(), EmojiScorer()
    right = torch.stack([nearest.score(images, prompts)["nearest_real_acc"] for images in made])
    objects = torch.stack([scorer.score(images, prompts)["object_acc"] for images in made])
    real = dataset.render([spec for spec in map(dataset.parse, prompts) if spec is not None], jitter=False)
    pixels = torch.stack([as_float(images) for images in made])
    with torch.no_grad():
        beside = reward.net.image(resized(real))
        measures = {
            "the reward": torch.stack([reward(images, prompts) for images in pixels]),
            "the reward's features of the real image": torch.stack(
                [(reward.net.image(resized(images)) * beside).sum(1) for images in pixels]
            ),
            "pixels of the real image": -(pixels - real).square().mean((2, 3, 4)),
            "high-frequency energy": torch.tensor(
                [[measure.hf_energy(image[None]) for image in images] for images in pixels]
            ),
        }
    print(f"nearest real: mean {right.mean():.1%}, at least one seed right {right.amax(0).mean():.1%}")
    print(f"objects: mean {objects.mean():.1%}, at least one seed right {objects.amax(0).mean():.1%}\n")
    print("| chosen by | nearest real | objects | told apart |\n|---|---|---|---|")
    for name, scores in measures.items():
        best = scores.argmax(0, keepdim=True)
        row = [right.gather(0, best).mean(), objects.gather(0, best).mean(), told_apart(scores, right)]
        print(f"| {name} | " + " | ".join(f"{100 * float(each):.1f}%" for each in row) + " |")


if __name__ == "__main__":
    main()
