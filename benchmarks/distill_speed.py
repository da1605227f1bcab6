"""Steps a second of a Decoupled-DMD distillation, beside the plain way, in one run.

The plain way does what one would write first: the teacher is asked three times (spear with prompt, spear with null
prompt, shield), every model runs through diffusers' own forward, which goes through a batch sample by sample, and
prompts are encoded when they are needed, padded to 512 tokens as diffusers' pipeline does. Each row takes one back.

    python benchmarks/distill_speed.py [--model micro] [--batch 32] [--steps 8]
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Sequence

import torch
from diffusers import ZImagePipeline
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from fewstep.config.load import load_recipe
from fewstep.core.conditioning import EncodedPrompts
from fewstep.core.denoiser import predict_x0
from fewstep.data.batch import DistillBatch
from fewstep.data.prompts import open_prompts
from fewstep.export.diffusers import to_diffusers
from fewstep.jobs import dmd_config
from fewstep.methods.dmd.method import DecoupledDMD, Question
from fewstep.models.pipeline import TextToImagePipeline, load
from fewstep.models.zimage.denoiser import ZImageDenoiser


class PlainDenoiser(nn.Module):
    """diffusers' own forward: a list of samples in, a list out."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, x: Tensor, sigma: Tensor, prompts: EncodedPrompts) -> Tensor:
        captions = [f[:n] for f, n in zip(prompts.features, prompts.lengths.tolist(), strict=True)]
        out = self.transformer([sample[:, None] for sample in x], 1 - sigma, captions, return_dict=False)[0]
        return -torch.stack(out).squeeze(2).float()


class PlainDmd(DecoupledDMD):
    """The same algorithm with three separate calls of the teacher."""

    def ask_teacher(self, questions: Sequence[Question]) -> list[Tensor]:
        return [predict_x0(self.teacher, *question) for question in questions]


class Arm:
    """One way to distil: a step is timed as a whole, optimizers included."""

    def __init__(
        self,
        model: TextToImagePipeline,
        texts: list[str],
        batch: int,
        denoiser: type,
        method: type,
        encode: bool,
        bf16: bool,
    ) -> None:
        recipe = load_recipe("micro-turbo", [])
        roles = [denoiser(copy.deepcopy(to_diffusers(model.transformer, model.family))) for _ in range(3)]
        teacher, student, fake = roles[0].requires_grad_(False), *(role.requires_grad_(True) for role in roles[1:])
        self.method = method(teacher, student, fake, model.encode([""]), dmd_config(recipe, model.shift))
        self.optimizers = {p.name: torch.optim.AdamW(p.module.parameters(), lr=1e-5) for p in self.method.trainables}
        self.model, self.texts, self.batch, self.encode, self.bf16 = model, texts, batch, encode, bf16
        self.encoded = model.encode(texts)
        self.shape = model.latent_shape(model.generation_config.height, model.generation_config.width)
        self.pipeline = ZImagePipeline(
            scheduler=model.scheduler, vae=model.vae, text_encoder=model.text_encoder, tokenizer=model.tokenizer,
            transformer=to_diffusers(model.transformer, model.family),
        )  # fmt: skip

    def prompts(self, chosen: Tensor) -> EncodedPrompts:
        if not self.encode:
            return self.encoded[chosen]
        with torch.no_grad():
            each, _ = self.pipeline.encode_prompt([self.texts[i] for i in chosen], do_classifier_free_guidance=False)
        return EncodedPrompts(nn.utils.rnn.pad_sequence(each, batch_first=True), torch.tensor([len(e) for e in each]))

    def step(self, seed: int) -> float:
        torch.manual_seed(seed)  # the same anchors in every arm, so the same number of forwards
        start = time.perf_counter()
        for trainable in self.method.trainables:
            for _ in range(trainable.updates_per_step):
                chosen = torch.randint(len(self.texts), (self.batch,))
                batch = DistillBatch(torch.randn(self.batch, *self.shape), self.prompts(chosen))
                with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
                    loss, _ = trainable.loss(batch)
                loss.backward()
                self.optimizers[trainable.name].step()
                self.optimizers[trainable.name].zero_grad()
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="micro")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=8)
    arguments = parser.parse_args()
    model = load(arguments.model)
    texts = open_prompts(load_recipe("micro-turbo", []).prompts).texts("train")[::16]
    arms = {
        "plain: all below": (PlainDenoiser, PlainDmd, True, False),
        "prompts encoded once": (PlainDenoiser, PlainDmd, False, False),
        "and the teacher asked once": (PlainDenoiser, DecoupledDMD, False, False),
        "and batched forwards (fewstep)": (ZImageDenoiser, DecoupledDMD, False, False),
        "the same, bf16 autocast": (ZImageDenoiser, DecoupledDMD, False, True),
        "diffusers' forward, bf16 autocast": (PlainDenoiser, DecoupledDMD, False, True),
    }
    built = {name: Arm(model, texts, arguments.batch, *parts) for name, parts in arms.items()}
    times: dict[str, list[float]] = {name: [] for name in built}
    for seed in range(arguments.steps + 1):
        for name, arm in built.items():  # in turn, so that a machine whose speed drifts drifts for all
            times[name].append(arm.step(seed))
    table = Table(
        title=f"Decoupled-DMD, batch {arguments.batch}, {torch.get_num_threads()} threads, {arguments.steps} steps"
    )
    for column in ("", "s/step (median)", "steps/s", "times the plain way"):
        table.add_column(column, justify="left" if not column else "right")
    plain = None
    for name, seconds in times.items():
        median = statistics.median(seconds[1:])  # the first warms up
        plain = plain or seconds[1:]
        ratio = statistics.median(p / s for p, s in zip(plain, seconds[1:], strict=True))
        table.add_row(name, f"{median:.3f}", f"{1 / median:.3f}", f"{ratio:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
