"""The README's strip: the micro teacher at 50 guided steps, and students of 8, 4, 2 and 1 steps, for the same prompts.

    python benchmarks/strip.py RUNS [--out docs/figures/strip.png] [--seed 0]

RUNS holds the runs of the recipes micro-8, micro-turbo, micro-2 and micro-1, as ``fewstep distill RECIPE`` writes them
to ``runs``; a run that is not there has no row. Image i starts from seed + i in every row.
"""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import fewstep

#: Combinations of object, style and background that are held out of all training.
PROMPTS = [
    "a noto emoji of a crescent moon on a black background",
    "a twemoji emoji of a pear on a blue background",
    "a noto emoji of a wrapped gift on a green background",
    "a twemoji emoji of a doughnut on a pink background",
    "a noto emoji of a trophy on a purple background",
    "a noto emoji of a frog on a white background",
    "a noto emoji of a unicorn on a yellow background",
    "a twemoji emoji of a fox on a red background",
]

#: Row -> the folder in RUNS whose student draws it, and its steps; the teacher is bundled.
STUDENTS = {"micro-8": 8, "micro-turbo": 4, "micro-2": 2, "micro-1": 1}
TEACHER, TEACHER_STEPS = "micro", 50

CELL, GAP, LABEL_WIDTH, HEADER_HEIGHT = 96, 6, 104, 58
BACKGROUND, TEXT, FAINT = "#ffffff", "#1f2328", "#656d76"


def draw_strip(rows: dict[str, Tensor], prompts: list[str], label_width: int = LABEL_WIDTH) -> Image.Image:
    """A labeled grid.

    Args:
        rows: two lines of label, separated by a newline -> its images, uint8 [N, H, W, 3], one for each prompt.
        prompts: N of them, above the columns.
    """
    width = label_width + len(prompts) * (CELL + GAP) + GAP
    height = HEADER_HEIGHT + len(rows) * (CELL + GAP) + GAP
    strip = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(strip)
    small, large = ImageFont.load_default(11), ImageFont.load_default(14)
    for column, prompt in enumerate(prompts):
        lines = "\n".join(textwrap.wrap(prompt, width=15)[:4])
        draw.multiline_text((label_width + column * (CELL + GAP), GAP), lines, fill=FAINT, font=small, spacing=2)
    for row, (label, images) in enumerate(rows.items()):
        top = HEADER_HEIGHT + row * (CELL + GAP)
        name, detail = label.split("\n")
        draw.text((GAP * 2, top + CELL // 2 - 18), name, fill=TEXT, font=large)
        draw.text((GAP * 2, top + CELL // 2 + 2), detail, fill=FAINT, font=small)
        for column, image in enumerate(images):
            scaled = Image.fromarray(image.numpy()).resize((CELL, CELL), Image.Resampling.BICUBIC)
            strip.paste(scaled, (label_width + column * (CELL + GAP), top))
    return strip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder of the students' runs")
    parser.add_argument("--out", type=Path, default=Path("docs/figures/strip.png"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    rows = {f"{TEACHER_STEPS} steps\nteacher, guided": (TEACHER, TEACHER_STEPS)}
    for run, steps in STUDENTS.items():
        if not (arguments.runs / run / "student").is_dir():
            print(f"{arguments.runs / run}: no student; the strip has no row for it")
            continue
        rows[f"{steps} {'step' if steps == 1 else 'steps'}\nstudent"] = (str(arguments.runs / run / "student"), steps)
    images = {
        label: fewstep.generate(model, PROMPTS, seed=arguments.seed, steps=steps).images
        for label, (model, steps) in rows.items()
    }
    draw_strip(images, PROMPTS).save(arguments.out)
    print(arguments.out)


if __name__ == "__main__":
    main()
