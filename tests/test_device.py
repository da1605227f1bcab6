"""Where models are put: one default for all commands and functions, and one device for all models of an evaluation."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from click import Command
from typer.main import get_command
from typer.testing import CliRunner

import fewstep
import fewstep.api
from fewstep.cli.main import app
from fewstep.core import device as devices
from fewstep.core.device import log_device, resolve_device
from fewstep.errors import UserError
from fewstep.evaluation.runner import evaluate
from fewstep.evaluation.settings import Setting
from fewstep.models.components import resolve_model
from fewstep.models.partial_models import load_prompt_encoder
from fewstep.models.pipeline import TextToImagePipeline, load
from fewstep.training.distributed import init_distributed


class Chosen(Exception):
    """Raised in place of work, with the device that was chosen for it."""


@pytest.fixture
def a_gpu(monkeypatch):
    """torch finds a GPU. Nothing can be allocated on it here, so what would be is raised as Chosen."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def resolve(device="auto"):
        raise Chosen(str(devices.parse_device(device)))

    for module in ("models.pipeline", "models.partial_models", "training.distributed", "jobs"):
        monkeypatch.setattr(f"fewstep.{module}.resolve_device", resolve)


def test_auto_is_the_gpu_where_there_is_one(monkeypatch):
    assert resolve_device().type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert devices.parse_device("auto") == torch.device("cuda")
    assert devices.parse_device("cpu") == torch.device("cpu")


COMPUTING = ("generate", "evaluate", "distill", "cache-trajectories", "encode-prompts")


def subcommand(name: str) -> Command:
    return get_command(app).commands[name]


@pytest.mark.parametrize("name", COMPUTING)
def test_every_command_that_computes_has_the_same_default(name):
    (option,) = [each for each in subcommand(name).params if each.name == "device"]
    assert option.default == "auto"


def words_of(name, tmp_path):
    (tmp_path / "prompts.txt").write_text("a fox\na bear\nan owl\n")
    (tmp_path / "cache.yaml").write_text("{kind: cache_trajectories, name: cache, teacher: micro, num_trajectories: 1}")
    return {
        "generate": ["micro", "a fox", "--out", str(tmp_path / "fox.png")],
        "evaluate": ["micro", "--out", str(tmp_path / "report")],
        "distill": ["micro-ca", "--out", str(tmp_path / "run")],
        "cache-trajectories": [str(tmp_path / "cache.yaml"), "--out", str(tmp_path / "cache")],
        "encode-prompts": [str(tmp_path / "prompts.txt"), "--model", "micro", "--out", str(tmp_path / "encoded")],
    }[name]


@pytest.mark.parametrize("name", COMPUTING)
@pytest.mark.parametrize(("options", "device"), [([], "cuda"), (["--device", "cpu"], "cpu")])
def test_every_command_computes_where_it_is_told_to(a_gpu, tmp_path, name, options, device):
    done = CliRunner().invoke(app, [name, *words_of(name, tmp_path), *options])
    assert isinstance(done.exception, Chosen), done.output
    assert str(done.exception) == device


@pytest.mark.parametrize("name", COMPUTING)
def test_a_device_that_is_not_there_is_one_line(tmp_path, name):
    for device, problem in (("gpu", "not a device; use auto, cpu"), ("cuda:99", "not available here")):
        done = CliRunner().invoke(app, [name, *words_of(name, tmp_path), "--device", device])
        assert done.exit_code == 1
        assert done.stderr.startswith(f"error: device {device}: {problem}")
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("call", [load, load_prompt_encoder, fewstep.generate, fewstep.evaluate, fewstep.distill])
def test_every_function_has_the_same_default(call):
    assert inspect.signature(call).parameters["device"].default == "auto"


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_functions_of_the_api_load_where_they_are_told_to(a_gpu, tmp_path, device):
    wanted = "cuda" if device == "auto" else "cpu"
    for call in (
        lambda: fewstep.load("micro", device),
        lambda: fewstep.generate("micro", "a fox", device=device),
        lambda: fewstep.evaluate("micro", ["a fox", "a bear"], device=device),
        lambda: fewstep.distill("micro-ca", tmp_path / "run", device=device),
    ):
        with pytest.raises(Chosen, match=f"^{wanted}$"):
            call()


def test_processes_of_a_distributed_run_take_no_gpu_by_number(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        pytest.raises(UserError, match="device cuda:1: every process takes a GPU of its own"),
        init_distributed("cuda:1"),
    ):
        pass
    with pytest.raises(UserError, match="device gpu: not a device"), init_distributed("gpu"):
        pass


def test_the_choice_is_one_line_and_given_once(tiny_folder, capsys):
    log_device.cache_clear()
    load(tiny_folder, "cpu")
    assert capsys.readouterr().err == ""
    load(tiny_folder)
    load(tiny_folder)
    assert capsys.readouterr().err == "device: cpu (no CUDA device is available)\n"


def test_the_line_names_the_gpu(monkeypatch, capsys):
    log_device.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
    log_device(torch.device("cuda", 1))
    log_device.cache_clear()
    assert capsys.readouterr().err == "device: cuda:1 (Some GPU)\n"


def test_a_pipeline_on_another_device_than_asked_for_is_refused(tiny):
    with pytest.raises(UserError, match="device cuda: the model is on cpu"):
        fewstep.generate(tiny, "a fox", device="cuda")
    with pytest.raises(UserError, match="device cuda:1: the model is on cpu"):
        fewstep.evaluate(tiny, ["a fox", "a bear"], device="cuda:1")
    assert fewstep.generate(tiny, "a fox", device="cpu", steps=1).nfe == 2


def on(device):
    """A model with no contents on a device."""
    return SimpleNamespace(device=torch.device(device), generation_config=SimpleNamespace(steps=4, guidance_scale=2.0))


def test_models_of_an_evaluation_on_several_devices_are_refused():
    prompts = ["a fox", "a bear"]
    with pytest.raises(UserError, match="teacher_50: its model is on cpu, not on cuda:0"):
        evaluate(on("cuda:0"), prompts=prompts, teacher=on("cpu"))
    settings = [Setting("first", on("cuda:0"), 1, 0.0), Setting("second", on("cuda:1"), 1, 0.0)]
    with pytest.raises(UserError, match="second: its model is on cuda:1, not on cuda:0"):
        evaluate(settings[0].model, prompts=prompts, settings=settings)


def test_the_teacher_is_loaded_on_the_models_device(monkeypatch, tiny):
    asked = []
    monkeypatch.setattr(TextToImagePipeline, "device", property(lambda _: torch.device("cuda", 1)))
    monkeypatch.setattr(fewstep.api, "load", lambda name, device, dtype: asked.append((name, device, dtype)))
    monkeypatch.setattr(fewstep.api, "_evaluate", lambda model, **options: None)
    fewstep.evaluate(tiny, ["a fox", "a bear"], teacher="micro")
    assert asked == [(resolve_model("micro"), torch.device("cuda", 1), torch.float32)]


def test_the_report_of_a_distillation_is_computed_where_it_trained(monkeypatch, tmp_path):
    """Student and teacher are loaded on the run's device, with only their transformers kept there."""
    loads, trained = [], []

    def distill(recipe, run, validator, dist):
        trained.append(dist.device)
        return run.directory / "student"

    def load(name, device, dtype=None, offload="none"):
        loads.append((str(name), device, offload))
        return SimpleNamespace(transformer=SimpleNamespace(dtype=torch.float32))

    monkeypatch.setattr(fewstep.api, "_distill", distill)
    monkeypatch.setattr(fewstep.api, "load", load)
    monkeypatch.setattr(fewstep.api, "evaluate", lambda model, prompts, **options: None)
    monkeypatch.setattr("fewstep.training.distributed.resolve_device", devices.parse_device)
    fewstep.distill("micro-ca", tmp_path / "run", device="cuda:0")
    where = torch.device("cuda:0")
    assert trained == [where]
    assert loads == [(str(tmp_path / "run" / "student"), where, "model"), ("micro", where, "model")]
