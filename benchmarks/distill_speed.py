"""Steps per second of a Decoupled-DMD distillation, compared with a straightforward implementation in the same run.

The straightforward one evaluates the teacher in three calls (for CFG augmentation with the prompt and with the null
prompt, for distribution matching with the prompt). Its models run through diffusers' own forward pass, which goes
through a batch sample by sample. It encodes prompts when they are needed, padded to 512 tokens as diffusers' pipeline
does. Each further row replaces one of these.

    python benchmarks/distill_speed.py [--model micro] [--batch 32] [--steps 8]
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from diffusers import ZImagePipeline
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from fewstep.config.load import load_recipe
from fewstep.config.recipe import DistillRecipe
from fewstep.core.conditioning import EncodedPrompts
from fewstep.core.denoiser import predict_x0
from fewstep.data.batch import DistillBatch
from fewstep.data.prompts import open_prompts
from fewstep.export.diffusers import to_diffusers
from fewstep.methods.base import MethodSetup
from fewstep.methods.dmd.method import DMD
from fewstep.methods.dmd.terms.base import DirectionTerm, Level, Renoised
from fewstep.methods.models_setup import Models
from fewstep.models.pipeline import TextToImagePipeline, load
from fewstep.models.zimage.denoiser import ZImageDenoiser
from fewstep.training.distributed import DistContext

#: CA and DM alone, from the first step on.
RECIPE_CHANGES = (
    *("method.terms={cfg_augmentation: {guidance_scale: 3.0}, distribution_matching: {}}", "method.fake_score_start=0"),
    "train.on_alert=off",
)


class PlainDenoiser(nn.Module):
    """diffusers' own forward pass: a list of samples in, a list out."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, x: Tensor, sigma: Tensor, prompts: EncodedPrompts) -> Tensor:
        captions = [f[:n] for f, n in zip(prompts.features, prompts.lengths.tolist(), strict=True)]
        out = self.transformer([sample[:, None] for sample in x], 1 - sigma, captions, return_dict=False)[0]
        return -torch.stack(out).squeeze(2).float()


class PlainDMD(DMD):
    """The same algorithm with three separate calls of the teacher."""

    def teacher_x0(
        self, terms: Collection[DirectionTerm], renoised: Mapping[Level, Renoised], prompts: EncodedPrompts
    ) -> dict[DirectionTerm, list[Tensor]]:
        given = {"cond": prompts, "null": self.null.repeat(len(prompts))}
        return {
            term: [predict_x0(self.teacher, *renoised[term.level], given[prompt]) for prompt in term.teacher_prompts]
            for term in terms
        }


@dataclass(frozen=True)
class Variant:
    """One way to distill.

    Attributes:
        encode_each_step: whether prompts are encoded at each step.
        bf16: whether losses are computed under autocast.
    """

    denoiser: type[nn.Module]
    method: type[DMD]
    encode_each_step: bool = False
    bf16: bool = False


VARIANTS = {
    "straightforward": Variant(PlainDenoiser, PlainDMD, encode_each_step=True),
    "prompts encoded once": Variant(PlainDenoiser, PlainDMD),
    "and one batched teacher call": Variant(PlainDenoiser, DMD),
    "and batched forward passes (fewstep)": Variant(ZImageDenoiser, DMD),
    "the same, bf16 autocast": Variant(ZImageDenoiser, DMD, bf16=True),
    "diffusers' forward pass, bf16 autocast": Variant(PlainDenoiser, DMD, bf16=True),
}


class Distillation:
    """A variant with its own models and optimizers; a step is timed as a whole, optimizers included."""

    def __init__(
        self,
        variant: Variant,
        recipe: DistillRecipe,
        model: TextToImagePipeline,
        texts: list[str],
        encoded: EncodedPrompts,
        batch_size: int,
    ) -> None:
        self.variant, self.texts, self.encoded, self.batch_size = variant, texts, encoded, batch_size

        def pipeline(trained: bool) -> TextToImagePipeline:
            made = copy.copy(model)
            transformer = copy.deepcopy(to_diffusers(model.transformer, model.family))
            made.denoiser = variant.denoiser(transformer).requires_grad_(trained)
            return made

        teacher, student, fake_score = pipeline(False), pipeline(True), pipeline(True).denoiser
        models = Models(teacher, student, {"fake_score": fake_score}, shares_base=False, teacher_path=recipe.teacher)
        method = variant.method.build(MethodSetup(recipe, models, model.encode([""]), {}, texts, DistContext()))
        self.trainables = method.trainables
        self.optimizers = {part.name: torch.optim.AdamW(part.module.parameters(), lr=1e-5) for part in self.trainables}
        self.shape = model.latent_shape(model.generation_config.height, model.generation_config.width)
        self.pipeline = ZImagePipeline(
            scheduler=model.scheduler, vae=model.vae, text_encoder=model.text_encoder, tokenizer=model.tokenizer,
            transformer=to_diffusers(model.transformer, model.family),
        )  # fmt: skip

    def prompts(self, chosen: Tensor) -> EncodedPrompts:
        if not self.variant.encode_each_step:
            return self.encoded[chosen]
        with torch.no_grad():
            each, _ = self.pipeline.encode_prompt([self.texts[i] for i in chosen], do_classifier_free_guidance=False)
        return EncodedPrompts(nn.utils.rnn.pad_sequence(each, batch_first=True), torch.tensor([len(e) for e in each]))

    def step(self, seed: int) -> float:
        """Seconds of a step."""
        torch.manual_seed(seed)  # the same anchors in every variant, so the same number of forward passes
        start = time.perf_counter()
        for trainable in self.trainables:
            for _ in range(trainable.updates_per_step):
                chosen = torch.randint(len(self.texts), (self.batch_size,))
                batch = DistillBatch(torch.randn(self.batch_size, *self.shape), self.prompts(chosen))
                with torch.autocast("cpu", torch.bfloat16, enabled=self.variant.bf16):
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
    recipe = load_recipe("micro-aligned", [f"teacher={arguments.model}", *RECIPE_CHANGES])
    assert isinstance(recipe, DistillRecipe)
    model = load(recipe.teacher, "cpu")
    texts = open_prompts(recipe.prompts).texts("train")[::16]
    encoded = model.encode(texts)
    built = {
        name: Distillation(each, recipe, model, texts, encoded, arguments.batch) for name, each in VARIANTS.items()
    }
    times: dict[str, list[float]] = {name: [] for name in built}
    for seed in range(arguments.steps + 1):
        for name, distillation in built.items():  # in turn, so that a drift of the machine's speed affects all
            times[name].append(distillation.step(seed))
    table = Table(
        title=f"Decoupled-DMD, batch {arguments.batch}, {torch.get_num_threads()} threads, {arguments.steps} steps"
    )
    for column in ("", "s/step (median)", "steps/s", "speedup"):
        table.add_column(column, justify="left" if not column else "right")
    plain = times["straightforward"][1:]  # the first step warms up
    for name, seconds in times.items():
        median = statistics.median(seconds[1:])
        speedup = statistics.median(p / s for p, s in zip(plain, seconds[1:], strict=True))
        table.add_row(name, f"{median:.3f}", f"{1 / median:.3f}", f"{speedup:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
