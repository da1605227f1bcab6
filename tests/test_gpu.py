"""What only a GPU shows: fp8 products, FSDP in bf16, compiled blocks, and plans against the allocator's peak.

Run with ``make test-gpu``; every test is marked ``gpu`` and left out of ``make test``.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from fewstep import api
from fewstep.config.load import load_recipe
from fewstep.core.conditioning import EncodedPrompts
from fewstep.data.batch import DistillBatch
from fewstep.methods.base import MethodSetup
from fewstep.methods.dmd.method import DMD
from fewstep.methods.models_setup import build_models
from fewstep.models.pipeline import load
from fewstep.models.quantize import Fp8Linear, supports_fp8_matmul
from fewstep.plan.costs import PROMPT_TOKENS
from fewstep.plan.estimate import plan
from fewstep.training.distributed import DistContext
from fewstep.training.train_state import TrainState

pytestmark = pytest.mark.gpu

SHORT = [
    *("train.steps=2", "train.batch_size=4", "train.log_every=1", "train.save_every=2", "train.sample_every=0"),
    *("evaluate.enabled=false", "evaluate.validate_every=0", "method.fake_score_updates=1"),
]


def test_fp8_products_are_close_to_bf16() -> None:
    if not supports_fp8_matmul("cuda"):
        pytest.fail("this GPU has no fp8 matrix products (needs compute capability 8.9)")
    torch.manual_seed(0)
    linear = nn.Linear(256, 128, bias=False).cuda().bfloat16()
    x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    exact, product = linear(x).float(), Fp8Linear(linear, True).cuda()(x).float()
    assert ((product - exact).norm() / exact.norm()).item() < 0.06


def test_bf16_training_on_the_gpu_resumes_exactly(tiny_folder, tmp_path) -> None:
    words = [f"teacher={tiny_folder}", *SHORT, "train.precision=bf16"]
    api.distill("micro-decoupled", tmp_path / "whole", overrides=[*words, "train.steps=4"])
    api.distill("micro-decoupled", tmp_path / "parts", overrides=words)
    api.distill("micro-decoupled", tmp_path / "parts", overrides=[*words, "train.steps=4"])
    whole, parts = (load(tmp_path / run / "student").transformer.state_dict() for run in ("whole", "parts"))
    assert max((whole[name] - parts[name]).abs().max().item() for name in whole) < 1e-3


def test_compiled_blocks_give_the_same_images(tiny_folder) -> None:
    plain, compiled = load(tiny_folder, "cuda"), load(tiny_folder, "cuda")
    compiled.denoiser.compile_repeated_blocks()
    images = [api.generate(model, ["a fox", "a bear"], seed=0, steps=3).images.float() for model in (plain, compiled)]
    assert (images[0] - images[1]).abs().mean().item() < 1.0  # of 255


def test_fsdp_in_bf16_trains_on_one_gpu(tiny_folder, tmp_path) -> None:
    """One process under torchrun takes the sharded path's launcher; more GPUs are used where there are some."""
    processes = min(2, torch.cuda.device_count())
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    words = ["-m", "fewstep", "distill", "micro-decoupled", "--out", str(tmp_path / "run")]
    settings = [f"teacher={tiny_folder}", *SHORT, "train.precision=bf16"]
    words += [word for setting in settings for word in ("-s", setting)]
    done = subprocess.run([*launch, *words], env=dict(os.environ), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_takes_the_planned_memory(tiny_folder, precision: str) -> None:
    """Within 10% of the CUDA allocator's peak, for saved activations, temporaries and gradients."""
    words = [f"teacher={tiny_folder}", "train.batch_size=4", "resolution=256", "train.on_alert=off"]
    recipe = load_recipe("micro-decoupled", [*words, f"train.precision={precision}"])
    planned = plan(recipe).memory
    teacher = load(tiny_folder, "cuda")
    teacher.set_size(256)
    models = build_models(recipe, teacher, ["fake_score"], DistContext(device=torch.device("cuda")))
    width = teacher.family.prompt_features(teacher.components)
    lengths = torch.full((4,), PROMPT_TOKENS)
    prompts = EncodedPrompts(torch.randn(4, PROMPT_TOKENS, width, device="cuda"), lengths)
    method = DMD.build(MethodSetup(recipe, models, prompts[:1], {}, [], DistContext(device=torch.device("cuda"))))
    batch = DistillBatch(torch.randn(4, *teacher.latent_shape(256, 256), device="cuda"), prompts)
    peaks = []
    for part in method.trainables:
        state = TrainState(part, recipe.optim[part.name], recipe.train)
        state.update([batch], 1)
        state.optimizer.zero_grad()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        state.update([batch, batch], 2)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        state.optimizer.zero_grad()
    names = ("gradients", "bf16 copies", "saved activations", "temporaries")
    assert sum(planned.get(name, 0.0) for name in names) == pytest.approx(max(peaks), rel=0.1)
