"""The training set "emoji-fluent": images in Fluent 3D, the style that the teacher is not trained on."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from fewstep.core.seeds import generator
from fewstep.data.images import to_pil, to_uint8
from fewstep.data.training_set.prepare import PrepareSettings, prepare
from fewstep.emoji.dataset import EmojiDataset, EmojiSpec

COUNT = 75
SIDE = 64  # pixels


def write_fluent_set(folder: Path, count: int = COUNT) -> None:
    """Write a set of ``count`` images of different objects, each with a prompt of the training split as its caption.

    Raises:
        UserError: it cannot be written.
    """
    dataset = EmojiDataset.load()
    chosen: dict[int, EmojiSpec] = {}
    for spec in dataset.sample(len(dataset.specs("train", ["fluent"])), "train", seed=0, styles=["fluent"]):
        chosen.setdefault(spec.object, spec)
    specs = list(chosen.values())[:count]
    images = dataset.render(specs, generator("fluent set"), SIDE)
    with TemporaryDirectory() as temporary:
        for number, (spec, image) in enumerate(zip(specs, to_uint8(images), strict=True)):
            file = Path(temporary) / f"{dataset.objects[spec.object].code}.png"
            to_pil(image).save(file)
            file.with_suffix(".txt").write_text(dataset.prompt(spec, number % 3) + "\n", encoding="utf-8")
        prepare(Path(temporary), folder, PrepareSettings(side=SIDE, fit="square"))
