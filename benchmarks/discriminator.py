"""How fast AdvDMD's discriminator learns to see: held-out AUC against updates, by learning rate and momentum.

    python benchmarks/discriminator.py [--model micro-turbo] [--prompts 640]

Final states of a student's stochastic rollout, with noise at the default ``final_sigma``, stand beside emoji images of
the same prompts. The heads are trained on three quarters of the prompts, in batches of 12, and measured on the others.
A small convolution on the latents, with none of the teacher's features, is the baseline.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fewstep.config.sections import PromptSettings
from fewstep.core import flow
from fewstep.core.seeds import generator
from fewstep.data.prompts import open_prompts
from fewstep.emoji.dataset import EmojiDataset
from fewstep.inference.generate import GenerationStep, generate
from fewstep.inference.params import SamplingParams
from fewstep.methods.adversarial.auc import auc
from fewstep.methods.adversarial.heads import DiscriminatorHeads, score_of
from fewstep.methods.adversarial.losses import discriminator_loss
from fewstep.methods.dmd.terms.adversary import AdversarySettings
from fewstep.models.pipeline import TextToImagePipeline, load

SETTINGS = AdversarySettings()
UPDATES, BATCH = (10, 25, 50, 100, 200), 12
OPTIMIZERS = [(1e-3, 0.0), (3e-3, 0.0), (1e-3, 0.9), (3e-3, 0.9), (1e-2, 0.9)]


def student_latents(student: TextToImagePipeline, prompts: list[str]) -> Tensor:
    """Final latents of a stochastic rollout: [N, C, H, W]."""
    stochastic = {"sampler": "sde", "eta": 0.9}
    student.generation_config = student.generation_config.model_copy(update=stochastic)
    found: list[Tensor] = []

    def keep(step: GenerationStep) -> None:
        if step.step == student.generation_config.steps:
            found.append(step.x0)

    generate(student, prompts, SamplingParams(batch_size=32), keep)
    return torch.cat(found)


@torch.no_grad()
def features_of(teacher: TextToImagePipeline, x: Tensor, prompts: list[str]) -> Tensor:
    """The teacher's features of noisy latents, [N, L, heads * D]."""
    parts = []
    for first in range(0, len(x), 32):
        part, sigma = x[first : first + 32], torch.full((len(x[first : first + 32]),), SETTINGS.final_sigma)
        encoded = teacher.encoder(prompts[first : first + 32])
        parts.append(teacher.denoiser.features(part, sigma, encoded, SETTINGS.depths))
    return torch.cat(parts)


def curve(
    model: nn.Module, score: Callable[[Tensor], Tensor], pairs: tuple[Tensor, Tensor], lr: float, momentum: float
) -> str:
    """Held-out and training AUC after each number of updates, as cells of a Markdown table."""
    real, fake = pairs
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(momentum, 0.99), weight_decay=0)
    trained, cells = 3 * len(real) // 4, []
    for update in range(1, max(UPDATES) + 1):
        rows = torch.randint(trained, (BATCH,))
        loss = discriminator_loss(score(real[rows]), score(fake[rows]), SETTINGS.loss).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if update in UPDATES:
            with torch.no_grad():
                of_real, of_fake = score_of(score(real)), score_of(score(fake))
            held_out, seen = (auc(of_real[rows], of_fake[rows]) for rows in (slice(trained, None), slice(trained)))
            cells.append(f"{held_out:.2f} ({seen:.2f})")
    return " | ".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="micro-turbo", help="a student of the bundled teacher")
    parser.add_argument("--prompts", type=int, default=640)
    options = parser.parse_args()
    texts = open_prompts(PromptSettings()).texts("train")
    order = torch.randperm(len(texts), generator=generator("discriminator prompts", 0))
    prompts = [texts[index] for index in order[: options.prompts].tolist()]
    teacher, dataset = load("micro"), EmojiDataset.load()
    fake = student_latents(load(options.model), prompts)
    specs = [spec for spec in map(dataset.parse, prompts) if spec is not None]
    images = dataset.render(specs, torch.Generator().manual_seed(0))
    real = torch.cat([teacher.encode_images(part) for part in images.split(64)])
    torch.manual_seed(0)
    sigma, eps = torch.full((len(real),), SETTINGS.final_sigma), torch.randn_like(real)
    noisy = flow.add_noise(real, sigma, eps), flow.add_noise(fake, sigma, eps)
    seen = features_of(teacher, noisy[0], prompts), features_of(teacher, noisy[1], prompts)
    width = seen[0].shape[-1] // len(SETTINGS.depths)
    print("held-out AUC (on training prompts), by updates")
    print("| | " + " | ".join(map(str, UPDATES)) + " |\n|" + "---|" * (len(UPDATES) + 1))
    for lr, momentum in OPTIMIZERS:
        torch.manual_seed(0)
        heads = DiscriminatorHeads(width, len(SETTINGS.depths), SETTINGS.hidden)

        def logits(features: Tensor, heads: nn.Module = heads) -> Tensor:
            return heads(features, sigma[: len(features)])

        print(f"| heads, lr {lr:g}, momentum {momentum:g} | {curve(heads, logits, seen, lr, momentum)} |", flush=True)
    torch.manual_seed(0)
    channels = real.shape[1]
    network = nn.Sequential(
        *(nn.Conv2d(channels, 64, 3, padding=1), nn.SiLU(), nn.Conv2d(64, 64, 3, padding=1), nn.SiLU()),
        nn.Conv2d(64, 1, 1),
    )
    print(
        f"| convolution, lr 3e-3, momentum 0.9 | {curve(network, lambda x: network(x).flatten(2), noisy, 3e-3, 0.9)} |"
    )


if __name__ == "__main__":
    main()
