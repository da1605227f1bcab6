"""Training of the emoji reward: contrastive, with hard negatives, adversarial, degraded and generated images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.core import seeds
from fewstep.core.method import BatchSource, Method, Shard, Trainable
from fewstep.emoji.dataset import BACKGROUNDS, LANGUAGES, NUM_TEMPLATES, STYLES, EmojiDataset, EmojiSpec
from fewstep.emoji.degrade import degrade, slightly_changed
from fewstep.emoji.latents import LatentBank, build_bank, image_key
from fewstep.emoji.recipes import RewardRecipe
from fewstep.emoji.reward import save_reward
from fewstep.emoji.reward_net import EmojiRewardNet
from fewstep.emoji.reward_quality import measure_reward, model_images, write_card
from fewstep.models.components import component_folder, load_component
from fewstep.models.family import get_family
from fewstep.models.vae import decode_latents, encode_images, to_channels_last
from fewstep.training.run_dir import RunDir
from fewstep.training.trainer import Trainer

LARGEST_LATENT_NOISE = 0.3  # relative to the latents', in the autoencoded images
RANKED = 3  # one of so many images is also degraded, and must then score less
MARGIN = 0.25  # by which the strongest degradation lowers the cosine
GENERATED_MARGIN = 0.1  # by which the cosine of a student's image is below the real one's


@dataclass
class RewardBatch:
    """
    images: [B, 3, 64, 64] in [0, 1].
    same: bool [B, B], whether image and prompt have the same object, style and background.
    degraded: blurred or noisy versions of the first images.
    severity: of each, in [0, 1].
    generated: a student's images of the last prompts; None without a student.
    """

    images: Tensor
    prompts: list[str]
    same: Tensor
    degraded: Tensor
    severity: Tensor
    generated: Tensor | None = None


class RewardTraining(Method):
    """Symmetric InfoNCE (CLIP, arXiv 2103.00020) on real, autoencoded and attacked images, and a ranking loss: degraded
    images, and a student's, score below real ones of the same prompt.

    Half of the images are changed by one step of the loss's gradient (FGSM in L2, arXiv 1412.6572): a student follows
    the reward's gradient, which must therefore point to changes that are seen, not to noise that fools the network.
    """

    def __init__(self, net: EmojiRewardNet, largest_attack: float) -> None:
        self.net, self.largest_attack = net, largest_attack
        self.trainables = [Trainable("reward", net, self.loss)]

    def loss(self, batch: RewardBatch) -> tuple[Tensor, dict[str, Tensor]]:
        scale = self.net.log_scale.exp().clamp(max=50)
        text = self.net.text(batch.prompts)
        half = len(batch.images) // 2
        attacked = self._attacked(batch.images[:half], text.detach(), batch.same[:half], float(scale.detach()))
        count = len(batch.images)
        ranked = len(batch.degraded)
        embedded = self.net.image(torch.cat([attacked, batch.images[half:], batch.degraded]))
        cosine = embedded[:count] @ text.T
        target = batch.same / batch.same.sum(1, keepdim=True)
        contrast = (F.cross_entropy(scale * cosine, target) + F.cross_entropy(scale * cosine.T, target.T)) / 2
        # the whole images at the batch's end are not attacked; their degraded versions follow in the same order
        rows = torch.arange(count - ranked, count)
        lower = (embedded[count:] * text[rows]).sum(1)
        gap = cosine[rows, rows] - lower
        ranking = F.softplus(10 * (MARGIN * batch.severity - gap)).mean() / 10
        # degraded or not, an image shows what it shows
        still = F.cross_entropy(scale * embedded[count:] @ text.T, target[rows])
        metrics = {
            "contrast": contrast.detach(),
            "ranking": ranking.detach(),
            "accuracy": batch.same.gather(1, cosine.argmax(1, keepdim=True)).float().mean(),
            "gap": gap.mean().detach(),
        }
        if batch.generated is not None:
            worse = self.net.image(batch.generated)
            behind = cosine[rows, rows] - (worse * text[rows]).sum(1)
            ranking = ranking + F.softplus(10 * (GENERATED_MARGIN - behind)).mean() / 10
            still = still + F.cross_entropy(scale * worse @ text.T, target[rows])
            metrics |= {"ranking": ranking.detach(), "generated_gap": behind.mean().detach()}
        return contrast + 6 * ranking + 0.2 * still, metrics

    def _attacked(self, images: Tensor, text: Tensor, same: Tensor, scale: float) -> Tensor:
        """Images changed by a random L2 norm up to ``largest_attack`` in the direction that raises the loss most."""
        with torch.enable_grad():
            leaf = images.detach().requires_grad_()
            target = same / same.sum(1, keepdim=True)
            loss = F.cross_entropy(scale * self.net.image(leaf) @ text.T, target)
            (gradient,) = torch.autograd.grad(loss, leaf)
        direction = gradient / gradient.flatten(1).norm(dim=1).clamp(min=1e-12)[:, None, None, None]
        size = self.largest_attack * torch.rand(len(images), 1, 1, 1, device=images.device)
        return (images + size * direction).clamp(0, 1).detach()


def train(recipe: RewardRecipe, run: RunDir) -> Path:
    """Train on the training split, measure on the held-out combinations, and save to ``<run>/model``."""
    torch.manual_seed(recipe.train.seed)
    dataset = EmojiDataset.load(recipe.data.num_objects)
    net = EmojiRewardNet(recipe.channels).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    trainer = Trainer(
        RewardTraining(net, recipe.largest_attack),
        reward_batches(
            dataset, autoencoded(dataset, recipe, run.directory), recipe, generated(dataset, recipe, run.directory)
        ),
        run,
        train=recipe.train,
        optim={"reward": recipe.optim},
    )
    trainer.fit()
    with trainer.ema_weights():
        kept = EmojiRewardNet(recipe.channels)
        # rounded to half precision as in the saved file, so that the measured weights are the saved ones
        kept.load_state_dict({name: tensor.half().float() for name, tensor in net.state_dict().items()})
    kept.eval().requires_grad_(False)
    preferred = {"real images": measure_reward(kept, dataset)}
    if recipe.teacher is not None:
        preferred[f"images of {recipe.teacher}"] = measure_reward(kept, dataset, model_images(recipe.teacher, 12), 64)
    description = {
        "channels": recipe.channels,
        "objects": [item.code for item in dataset.objects],
        "steps": trainer.step,
        "batch_size": recipe.train.batch_size,
        "student": recipe.student,
        "preferred": preferred,
    }
    save_reward(kept, description, run.directory / "model")
    write_card(run.directory / "model", description, sum(p.numel() for p in kept.parameters()))
    return run.directory / "model"


@torch.no_grad()
def autoencoded(dataset: EmojiDataset, recipe: RewardRecipe, directory: Path) -> LatentBank:
    """Images of the training split through the autoencoder, with noise on their latents, fp16 in [0, 1]."""
    vae = to_channels_last(
        load_component(component_folder(recipe.vae), "vae", torch.float32, get_family("ZImagePipeline"))
    )
    generator = seeds.generator("latent noise", recipe.train.seed)

    def there_and_back(images: Tensor) -> Tensor:
        latents = encode_images(vae, images)
        size = LARGEST_LATENT_NOISE * torch.rand(len(images), 1, 1, 1, generator=generator)
        return decode_latents(vae, latents + size * torch.randn(latents.shape, generator=generator))

    specs, count = dataset.specs("train", STYLES), recipe.data.augmentations_per_object
    return build_bank(dataset, specs, there_and_back, count, recipe.train.seed, directory / "autoencoded.safetensors")


def generated(dataset: EmojiDataset, recipe: RewardRecipe, directory: Path) -> LatentBank | None:
    """A student's images of the training prompts, fp16 in [0, 1]; None without a student."""
    if recipe.student is None:
        return None
    make = model_images(recipe.student, steps=None)
    specs, file = dataset.specs("train", STYLES), directory / "generated.safetensors"
    return build_bank(dataset, specs, lambda images: images, 1, recipe.train.seed, file, lambda some, _: make(some))


def reward_batches(
    dataset: EmojiDataset, bank: LatentBank, recipe: RewardRecipe, by_student: LatentBank | None = None
) -> BatchSource:
    """Batches of groups of four that differ in one or two of object, style and background: the hard negatives.

    Of the images a half is autoencoded; all are shifted, scaled and tinted a little.
    """
    train_specs = dataset.specs("train", STYLES)
    languages: dict[tuple[int, str, str], list[str]] = {}
    for spec in train_specs:
        languages.setdefault(image_key(spec), []).append(spec.language)

    def batch(position: int, shard: Shard = Shard()) -> RewardBatch:  # noqa: B008  # frozen
        generator = seeds.generator("reward batch", recipe.train.seed, position)
        chosen = hard_specs(dataset, languages, recipe.train.batch_size, generator)
        real = dataset.render(chosen, generator)
        decoded = bank.draw(chosen, generator)
        pick = torch.rand(len(chosen), 1, 1, 1, generator=generator) < 0.5
        images = slightly_changed(torch.where(pick, decoded, real), generator)
        templates = torch.randint(NUM_TEMPLATES, (len(chosen),), generator=generator).tolist()
        prompts = [dataset.prompt(spec, template) for spec, template in zip(chosen, templates, strict=True)]
        keys = [image_key(spec) for spec in chosen]
        rows = shard.rows(len(chosen))
        kept = keys[rows]
        same = torch.tensor([[float(one == other) for other in kept] for one in kept])
        ranked = max(1, len(kept) // RANKED)
        severity = torch.rand(ranked, generator=generator)
        degraded = degrade(images[rows][-ranked:], severity, generator)
        worse = None
        if by_student is not None:
            worse = slightly_changed(by_student.draw(chosen[rows][-ranked:], generator), generator)
        return RewardBatch(images[rows], prompts[rows], same, degraded, severity, worse)

    return batch


def hard_specs(
    dataset: EmojiDataset, languages: dict[tuple[int, str, str], list[str]], count: int, generator: torch.Generator
) -> list[EmojiSpec]:
    """``count`` training specs in random order, made of blocks: two objects, two styles, two backgrounds, all eight
    combinations, less those that are held out."""

    def pick(options: Sequence[str]) -> list[str]:
        return [options[i] for i in torch.randperm(len(options), generator=generator)[:2].tolist()]

    found: list[EmojiSpec] = []
    while len(found) < count:
        objects = torch.randperm(len(dataset.objects), generator=generator)[:2].tolist()
        styles, backgrounds = pick(STYLES), pick(list(BACKGROUNDS))
        for key in [(item, style, color) for item in objects for style in styles for color in backgrounds]:
            if key in languages:
                spoken = languages[key]
                language = spoken[int(torch.randint(len(spoken), (), generator=generator))]
                found.append(replace(EmojiSpec(*key, LANGUAGES[0]), language=language))
    order = torch.randperm(len(found), generator=generator)[:count].tolist()
    return [found[i] for i in order]
