"""The Python API: four functions, and an import that does not wait for torch."""

import re
import subprocess
import sys

import torch

import fewstep
from fewstep.evaluation.runner import emoji_prompts

PROMPT = "a noto emoji of a red apple on a blue background"


def test_import_is_light():
    program = "import fewstep, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_the_functions_of_the_api_are_plain_functions():
    assert {name: type(getattr(fewstep, name)).__name__ for name in fewstep.__all__} == dict.fromkeys(
        ("distill", "evaluate", "generate", "load"), "function"
    )


def test_load_and_generate(tiny):
    model = fewstep.load("micro")
    assert (
        model.generation_config.steps,
        model.generation_config.height,
        model.generation_config.guidance_distilled,
    ) == (50, 64, False)
    made = fewstep.generate(model, PROMPT, seed=1, steps=2)
    assert made.images.shape == (1, 64, 64, 3)
    assert made.images.dtype == torch.uint8
    assert torch.equal(made.images, fewstep.generate("micro", [PROMPT], seed=1, steps=2).images)


def test_evaluate(tmp_path):
    model = fewstep.load("micro")
    model.generation_config.steps = 3
    metrics = fewstep.evaluate(
        model, emoji_prompts(4), teacher="micro", out=tmp_path, diversity_prompts=2, diversity_seeds=2, many_steps=4
    )
    assert list(metrics.arms) == ["teacher_4", "teacher_3", "teacher_3_guided", "student_3"]
    wanted = {"name_top1", "style_top1", "color_top1", "fd_teacher", "fd_real", "mmd_real", "diversity", "saturation"}
    for figures in metrics.arms.values():
        assert wanted | {"hf_energy", "seconds_per_image", "forwards"} <= set(figures)
    assert (tmp_path / "metrics.json").is_file()
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"""(src|href|url\()=?["']?https?:""", page)  # it needs no network
