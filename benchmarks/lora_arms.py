"""The ways of benchmarks/lora.py: how each one trains a LoRA for the 4-step student, and what it is trained on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from fewstep.core.seeds import generator
from fewstep.data.images import to_pil, to_uint8
from fewstep.data.training_set.prepare import PrepareSettings, prepare
from fewstep.emoji.dataset import EmojiDataset, EmojiSpec, with_article
from fewstep.emoji.lora_set import SIDE, write_fluent_set

STUDENT, BASE = "micro-turbo", "micro"
RENOISE = "guidance_scale: 1.5, renoise: constrained"


@dataclass(frozen=True)
class Arm:
    """One way.

    Attributes:
        recipe: a shipped one. overrides: of it; BASE_LORA, ADAPTER stand for files that are made before.
        base_share: share of the time that is spent on a LoRA of the base first.
    """

    recipe: str
    overrides: tuple[str, ...] = ()
    base_share: float = 0.0


# Chosen on the base, preserved, with seed 0 and 2 minutes: names in other prompts are right in 88%; at a rate of 1e-2
# in 60 to 75%.
FLOW_MATCHING = (f"model={STUDENT}", "data.preservation=null", "timesteps.distribution=shift", "adapter.rank=64",
                 "optim.lora.lr=3.0e-3")  # fmt: skip
PRESERVED = ("data.preservation={prompts: emoji, count: 128, fraction: 0.33}",)
ON_BASE = (f"model={BASE}",)
TRANSPORT = (
    f"method={{name: decoupled_dmd, teacher: {BASE}, lora: BASE_LORA, student_start: 5, {RENOISE}}}",
    "adapter={rank: 64, init: BASE_LORA}",
    "optim={lora: {lr: 3.0e-4, betas: [0.0, 0.99], ema_decay: 0.9}, fake_score: {lr: 4.0e-4, betas: [0, 0.99]}}",
)
FOLLOW = (f"method={{name: trajectory, teacher: {BASE}, lora: BASE_LORA, guidance_scale: 1.5}}", *FLOW_MATCHING)
TOGETHER = (
    "method.student_start=30",
    "timesteps.distribution=shift",
    "adapter.rank=64",
    "optim={lora: {lr: 1.0e-3, betas: [0.0, 0.99], warmup_steps: 10, ema_decay: 0.95}, "
    "teacher: {lr: 3.0e-3, warmup_steps: 10}, fake_score: {lr: 1.0e-3, betas: [0.0, 0.99]}}",
)

ARMS: dict[str, Arm] = {
    "a plain": Arm("micro-lora", FLOW_MATCHING),
    "b training adapter": Arm("micro-lora", (*FLOW_MATCHING, "method.training_adapter=ADAPTER")),
    "c on the base": Arm("micro-lora", (*FLOW_MATCHING, *ON_BASE)),
    "c on the base, preserved": Arm("micro-lora", (*FLOW_MATCHING, *PRESERVED, *ON_BASE)),
    "d transport, preserved": Arm("micro-lora-dmd", (*TRANSPORT, *PRESERVED), base_share=0.5),
    "e trajectory": Arm("micro-lora", FOLLOW, base_share=0.5),
    "f self-distillation": Arm("micro-lora", (*FLOW_MATCHING, "method={name: self_distillation}")),
    "g Decoupled-DMD": Arm("micro-lora-dmd", TOGETHER),
}


@dataclass(frozen=True)
class Subject:
    """What is taught.

    Attributes:
        write: writes its training set into a folder.
        right: the score that shows whether it was learned.
        word: the name that stands in prompts for the object ``named``; both "" for a style.
    """

    write: Callable[[Path], None]
    right: str
    word: str = ""
    named: str = ""

    def prompts(self, count: int) -> tuple[list[str], list[str]]:
        """Prompts of the subject that its set does not have, and what an image of each must show."""
        dataset = EmojiDataset.load()
        if not self.word:
            shown = [dataset.prompt(spec) for spec in dataset.sample(count, "test", seed=1, styles=["fluent"])]
            return shown, shown
        specs = thing_specs(dataset, self.named)[THING_SPECS:]
        shown = [dataset.prompt(specs[i % len(specs)], i // len(specs) % 3) for i in range(count)]
        return [renamed(prompt, self.named, self.word) for prompt in shown], shown


THING_COUNT, THING_SPECS = 20, 10  # images, of so many combinations of style and background
THING, WORD = "unicorn", "zorp"


def thing_specs(dataset: EmojiDataset, name: str) -> list[EmojiSpec]:
    """The English specs of an object, in a fixed shuffled order."""
    every = dataset.sample(len(dataset.specs()), seed=2)
    return [spec for spec in every if dataset.objects[spec.object].en == name and spec.language == "en"]


def renamed(prompt: str, name: str, word: str) -> str:
    return prompt.replace(with_article(name), f"a {word}").replace(name, word)


def write_thing_set(folder: Path) -> None:
    """``THING_COUNT`` images of one object in both of the teacher's styles, under a name that the teacher has never
    seen; some combinations of style and background are left for the measurement."""
    dataset = EmojiDataset.load()
    seen = thing_specs(dataset, THING)[:THING_SPECS]
    specs = [seen[number % THING_SPECS] for number in range(THING_COUNT)]
    images = to_uint8(dataset.render(specs, generator("thing set"), SIDE))
    with TemporaryDirectory() as temporary:
        for number, (spec, image) in enumerate(zip(specs, images, strict=True)):
            file = Path(temporary) / f"{number:02d}.png"
            to_pil(image).save(file)
            text = renamed(dataset.prompt(spec, number % 3), THING, WORD)
            file.with_suffix(".txt").write_text(text, encoding="utf-8")
        prepare(Path(temporary), folder, PrepareSettings(side=SIDE, fit="square"))


SUBJECTS = {
    "style": Subject(write_fluent_set, "style_acc"),
    "thing": Subject(write_thing_set, "object_acc", WORD, THING),
}
