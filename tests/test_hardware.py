"""What the device cannot do natively: a line with the measured cost and the setting to use, or a refusal at once."""

import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import fewstep
from fewstep.config.load import load_recipe
from fewstep.config.recipe import DistillRecipe
from fewstep.config.sections import OptimSettings
from fewstep.core import compiler, precision
from fewstep.core.compiler import check_compiler
from fewstep.core.precision import bf16_cost, fp8_cost, has_native_bf16, uses_bf16, warn_if_emulated
from fewstep.errors import UserError
from fewstep.methods.models_setup import check_models
from fewstep.models.partial_models import load_prompt_encoder
from fewstep.models.pipeline import load
from fewstep.training.optim import make_optimizer
from fewstep.training.precision import resolve_precision
from fewstep.training.run_dir import RunDir

CPU = torch.device("cpu")


@pytest.fixture
def avx2(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU with AVX2 alone; its emulation is 20 times slower than fp32."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64", "avx2": True})
    monkeypatch.setattr(precision, "bf16_cost", lambda device: 20.0)


@pytest.mark.parametrize(
    ("capabilities", "native"),
    [
        ({"avx2": True, "avx512_f": True, "avx512_bf16": False}, False),
        ({"avx512_bf16": True}, True),
        ({"amx_bf16": True, "avx512_bf16": False}, True),
        ({"architecture": "arm64", "neon": True, "bf16": True}, True),
        ({"architecture": "arm64", "neon": True, "bf16": False}, False),
    ],
)
def test_native_bf16_by_the_capabilities_of_the_cpu(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, Any], native: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert has_native_bf16(CPU) is native
    assert uses_bf16("auto", CPU) is native
    assert uses_bf16("bf16", CPU)
    assert not uses_bf16("fp32", CPU)


@pytest.mark.parametrize("native", [True, False])
def test_native_bf16_of_a_gpu(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    """A T4 or V100 emulates bf16, which ``is_bf16_supported`` counts as support by default."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    assert has_native_bf16(torch.device("cuda")) is native


def test_costs_are_measured() -> None:
    """Without oneDNN torch computes bf16 products on the CPU as it does where there are no bf16 instructions."""
    with torch.backends.mkldnn.flags(enabled=False):
        assert bf16_cost.__wrapped__(CPU) > 3
    assert fp8_cost.__wrapped__(CPU) > 0


def test_emulated_bf16_is_one_line_with_its_cost(avx2: None) -> None:
    with pytest.warns(UserWarning, match="^train.precision bf16: ") as caught:
        warn_if_emulated("train.precision bf16", CPU, "train.precision: auto, or fp32")
    assert str(caught[0].message) == (
        "train.precision bf16: this cpu has no bf16 instructions, a matrix product takes 20 times as long as in fp32; "
        "use train.precision: auto, or fp32"
    )


@pytest.mark.parametrize("recipe", ["micro-aligned", "micro-long", "micro-teacher", "classifier"])
def test_recipe_in_emulated_bf16_warns_before_the_training(avx2: None, tmp_path: Path, recipe: str) -> None:
    override = "stages.1.train.precision=bf16" if recipe == "micro-long" else "train.precision=bf16"
    with pytest.warns(UserWarning, match=r"^train.precision bf16: .* 20 times .* use train.precision: auto, or fp32$"):
        resolve_precision(load_recipe(recipe, [override]), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resolve_precision(load_recipe(recipe, [override.replace("bf16", "auto")]), tmp_path)
        resolve_precision(load_recipe(recipe, [override.replace("bf16", "fp32")]), tmp_path)


def test_weights_in_emulated_bf16_or_without_fp8_products_warn(
    avx2: None, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.warns(UserWarning, match=r"^weights in bf16: .* use dtype fp32"):
        load(tiny_folder, dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match=r"^weights in bf16: .* use dtype fp32"):
        load_prompt_encoder(tiny_folder, dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match=r"^weights in fp8: .* converting .* times as long .* use dtype bf16"):
        load(tiny_folder, dtype=torch.float8_e4m3fn)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(tiny_folder)
        monkeypatch.undo()
        if has_native_bf16(CPU):
            load(tiny_folder, dtype=torch.bfloat16)


def test_auto_precision_is_decided_once_and_written_into_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that moves to a machine without bf16 instructions keeps its precision, with a warning."""
    given = load_recipe("micro-aligned", ["train.precision=auto"])
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    first = resolve_precision(given, tmp_path)
    with RunDir(tmp_path, first):
        assert yaml.safe_load((tmp_path / "recipe.yaml").read_text())["train"]["precision"] == "bf16"
    assert given.train.precision == "auto"

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    with pytest.warns(UserWarning, match="train.precision bf16"):
        moved = resolve_precision(given, tmp_path)
    assert moved == first
    with RunDir(tmp_path, moved):
        pass
    assert resolve_precision(given, tmp_path, overwrite=True).train.precision == "fp32"
    assert resolve_precision(given, tmp_path / "other").train.precision == "fp32"


def test_auto_precision_of_stages_and_of_runs_of_earlier_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    stages = resolve_precision(load_recipe("micro-long", ["stages.0.train.precision=auto"]), tmp_path)
    assert {stage.train.precision for stage in stages.stages} == {"fp32"}
    given = load_recipe("micro-aligned", ["train.precision=auto"])
    with RunDir(tmp_path / "old", given):  # an earlier version wrote "auto"
        pass
    with RunDir(tmp_path / "old", resolve_precision(given, tmp_path / "old")) as run:
        assert run.recipe == given


def test_distillation_writes_its_precision(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewstep.api._distill", lambda recipe, run, *_: run.directory)
    more = [f"teacher={tiny_folder}", "train.precision=auto", "evaluate={enabled: false}"]
    fewstep.distill("micro-aligned", tmp_path, overrides=more)
    written = load_recipe(tmp_path / "recipe.yaml")
    assert isinstance(written, DistillRecipe)
    assert written.train.precision == ("bf16" if has_native_bf16(CPU) else "fp32")


@pytest.mark.parametrize("backend", ["_native_cudnn", "_native_efficient", "flash", "nonsense"])
def test_attention_backend_that_does_not_run_here_is_refused_at_once(tiny_folder: Path, backend: str) -> None:
    """cuDNN's and the memory-efficient kernel have no CPU version: diffusers finds it out in the first layer."""
    model = load(tiny_folder)
    with pytest.raises(UserError, match=rf"^attention {backend}: ") as error:
        model.set_attention_backend(backend)
    assert "\n" not in str(error.value)
    fewstep.generate(model, "a fox", steps=1)  # still runs, with the native one


def test_missing_compiler_is_named_before_any_data_is_made(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    recipe = load_recipe("micro-aligned", [f"teacher={tiny_folder}", "models.compile=true"])
    assert isinstance(recipe, DistillRecipe)
    model = load(tiny_folder)
    with pytest.raises(UserError, match=r"^models\.compile: no-such-compiler -O2 is missing; install a C"):
        check_models(recipe, model)
    with pytest.raises(UserError, match="compile: no-such-compiler -O2 is missing"):
        model.denoiser.compile_repeated_blocks()
    with pytest.raises(UserError, match=r"optim.\*.optimizer=adamw8bit: no-such-compiler -O2 is missing"):
        make_optimizer({"w": torch.nn.Parameter(torch.ones(1))}, OptimSettings(lr=1, optimizer="adamw8bit"))
    monkeypatch.setenv("CXX", "sh -c g++")  # a program with arguments, as ccache
    check_compiler(CPU, "compile")


def test_auto_compiles_only_where_there_is_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    monkeypatch.setenv("CXX", sys.executable)  # any program that exists
    monkeypatch.setattr(compiler.sysconfig, "get_paths", lambda: {"include": str(Path(__file__).parent)})
    assert not compiler.compiles("auto", device)  # no Python.h
    with pytest.raises(UserError, match=r"^compile: .*Python\.h is missing; install Python's headers"):
        compiler.check_compiler(device, "compile")
    monkeypatch.undo()
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not compiler.compiles("auto", device)
    assert compiler.compiles(True, device)
    assert not compiler.compiles(False, device)


def test_compiling_for_a_gpu_needs_triton_and_a_recent_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GTX 1080")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    with pytest.raises(UserError, match=r"^compile: GTX 1080 is older than compute capability 7\.0; set"):
        check_compiler(gpu, "compile")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(compiler.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="compile: Triton is missing; install triton"):
        check_compiler(gpu, "compile")
    monkeypatch.setattr(compiler.importlib.util, "find_spec", lambda name: "found")
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(UserError, match="compile: Triton needs gcc or clang"):
        check_compiler(gpu, "compile")
