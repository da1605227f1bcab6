"""Images of the LoRA study's runs beside each other: the student with the LoRA files of several ways, one seed.

python benchmarks/lora_images.py --out runs/lora-study
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dmdr import folder_name
from lora_arms import ARMS, STUDENT
from matplotlib.figure import Figure

from fewstep.inference.generate import generate
from fewstep.inference.params import SamplingParams
from fewstep.models.pipeline import load

SHOWN = ("a plain", "c on the base", "c on the base, preserved", "d transport, preserved")
OTHERS = ["a noto emoji of a fox on a blue background", "a twemoji emoji of a red apple on a green background"]
PROMPTS = {
    "style": [
        "a fluent emoji of a lion on a blue background",
        "a fluent emoji of a guitar on a white background",
        "a fluent emoji of a mushroom on a pink background",
        *OTHERS,
    ],
    "thing": [
        "a noto emoji of a zorp on a blue background",
        "a twemoji emoji of a zorp on a red background",
        "a noto emoji of a zorp on a green background",
        *OTHERS,
    ],
}


def draw(out: Path) -> Figure:
    """A row for each way; for each subject three of its prompts and two others. Files are those of seed 0."""
    names = ["no LoRA", *SHOWN]
    figure = Figure(figsize=(12.5, 5.6))
    panels = figure.subplots(len(names), 10, gridspec_kw={"hspace": 0.04, "wspace": 0.04})
    for block, (subject, prompts) in enumerate(PROMPTS.items()):
        for row, name in zip(panels, names, strict=True):
            file = None if name == "no LoRA" else out / subject / f"{folder_name(name)}-0" / "lora"
            loras = {} if file is None else {str(file / f"{ARMS[name].recipe}.safetensors"): 1.0}
            images = generate(load(STUDENT, loras=loras), prompts, SamplingParams(seed=3)).images
            for panel, image in zip(row[5 * block :], images, strict=False):
                panel.imshow(image.numpy(), interpolation="nearest")
                panel.set(xticks=[], yticks=[])
            if block == 0:
                row[0].set_ylabel(name.replace(", ", ",\n"), rotation=0, ha="right", va="center")
        panels[0][5 * block].set_title(f"{subject}: three of its prompts, two others", loc="left", fontsize=10)
    figure.subplots_adjust(left=0.11, right=0.995, top=0.94, bottom=0.01)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/lora-study"), help="folder of benchmarks/lora.py")
    options = parser.parse_args()
    draw(options.out).savefig(options.out / "images.png", dpi=90)


if __name__ == "__main__":
    main()
