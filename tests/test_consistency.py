"""Components that do not fit each other are refused when a model is loaded, in one line, before any work."""

import copy
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from test_components import FILES
from typer.testing import CliRunner

from fewstep.cli.main import app
from fewstep.config.load import load_recipe
from fewstep.emoji.recipes import TextEncoderSettings
from fewstep.emoji.train_text_encoder import build_text_encoder
from fewstep.emoji.train_vae import build_vae
from fewstep.errors import UserError
from fewstep.methods.models_setup import build_models
from fewstep.models.meta_pipeline import meta_pipeline
from fewstep.models.partial_models import load_prompt_encoder, with_components_from
from fewstep.models.pipeline import TextToImagePipeline, load
from fewstep.plan.estimate import plan


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_folder, tmp_path / "model")


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def set_template(folder: Path, template: str | None) -> None:
    (folder / "tokenizer" / "chat_template.jinja").unlink(missing_ok=True)
    edit(folder / "tokenizer" / "tokenizer_config.json", chat_template=template)


def all_refuse(folder: Path, message: str) -> None:
    """Every way to open a whole model, and the command line."""
    transformer = load(folder.parent / "good").transformer
    for opened in (lambda: load(folder), lambda: with_components_from(transformer, folder)):
        with pytest.raises(UserError) as error:
            opened()
        assert str(error.value).startswith(f"{folder}/")
        assert message in str(error.value)
    out = folder.parent / "fox.png"
    done = CliRunner().invoke(app, ["generate", str(folder), "a fox", "--out", str(out)])
    assert (done.exit_code, done.stderr.count("\n"), out.exists()) == (1, 1, False)
    assert message in done.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scaling_factor": None}, "scaling_factor in its config.json is None"),
        ({"scaling_factor": 0}, "scaling_factor in its config.json is 0"),
        ({"scaling_factor": math.nan}, "scaling_factor in its config.json is nan"),
        ({"shift_factor": None}, "shift_factor in its config.json is None"),
        ({"shift_factor": math.inf}, "shift_factor in its config.json is inf"),
        ({"shift_factor": "0.1"}, "shift_factor in its config.json is 0.1"),
    ],
)
def test_factors_of_the_autoencoder(folder: Path, changes: dict[str, object], message: str) -> None:
    shutil.copytree(folder, folder.parent / "good")
    edit(folder / "vae" / "config.json", **changes)
    all_refuse(folder, message)
    with pytest.raises(UserError, match=message):
        meta_pipeline(folder, torch.bfloat16)


def test_an_autoencoder_of_other_latents(folder: Path) -> None:
    shutil.copytree(folder, folder.parent / "good")
    shutil.rmtree(folder / "vae")
    build_vae([8, 8, 16, 16], 1, 4, 4).save_pretrained(folder / "vae")
    edit(folder / "vae" / "config.json", shift_factor=0.1)
    all_refuse(folder, "its latents have 4 channels, the transformer takes 16")


def test_a_text_encoder_of_another_width(folder: Path, tiny: TextToImagePipeline) -> None:
    shutil.copytree(folder, folder.parent / "good")
    settings = TextEncoderSettings(
        vocab_size=len(tiny.tokenizer), hidden_size=40, layers=2, heads=2, head_dim=16, intermediate_size=48
    )
    shutil.rmtree(folder / "text_encoder")
    build_text_encoder(settings, tiny.tokenizer).save_pretrained(folder / "text_encoder")
    all_refuse(folder, "its hidden states have 40 features, the transformer takes 32")
    recipe = load_recipe("micro-aligned", [f"teacher={folder}"])
    with pytest.raises(UserError, match="text_encoder: its hidden states have 40 features"):
        plan(recipe)


def test_a_text_encoder_with_fewer_tokens_than_the_tokenizer(folder: Path, tiny: TextToImagePipeline) -> None:
    shutil.copytree(folder, folder.parent / "good")
    config = copy.deepcopy(tiny.text_encoder.config)
    config.vocab_size, config.pad_token_id = 300, 0
    shutil.rmtree(folder / "text_encoder")
    type(tiny.text_encoder)(config).save_pretrained(folder / "text_encoder")
    all_refuse(folder, f"has {len(tiny.tokenizer)} tokens, the text encoder has embeddings for 300")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template"),
        ("{% for m in messages %}", "its chat template cannot be applied"),
        ("{{ raise_exception('no users') }}", "its chat template cannot be applied (no users)"),
        ("<|im_start|>assistant", "its chat template leaves the prompt out"),
    ],
)
def test_chat_templates(folder: Path, template: str | None, message: str) -> None:
    shutil.copytree(folder, folder.parent / "good")
    set_template(folder, template)
    all_refuse(folder, message)
    with pytest.raises(UserError):
        load_prompt_encoder(folder)
    prompts, out = folder.parent / "prompts.txt", folder.parent / "encoded"
    prompts.write_text("a fox\na cat\n")
    done = CliRunner().invoke(app, ["encode-prompts", str(prompts), "--model", str(folder), "--out", str(out)])
    assert (done.exit_code, done.stderr.count("\n"), out.exists()) == (1, 1, False)
    assert message in done.stderr


def test_a_template_without_a_system_turn(folder: Path) -> None:
    """It works until somebody gives a system prompt."""
    set_template(
        folder,
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{{ m.content }}{% endfor %}",
    )
    model = load(folder)
    assert model.encode(["a fox"]).lengths.item() > 0
    with pytest.raises(UserError, match=r"cannot be applied with a system prompt \(System role not supported\)"):
        model.encode(["a fox"], system="Draw.")


def test_patch_sizes_of_the_transformer(folder: Path) -> None:
    shutil.copytree(folder, folder.parent / "good")
    config = json.loads((folder / "transformer" / "config.json").read_text())
    shutil.rmtree(folder / "transformer")
    other = type(load(folder.parent / "good").transformer).from_config({**config, "all_patch_size": [4]})
    other.save_pretrained(folder / "transformer")
    with pytest.raises(UserError, match=r"all_patch_size \[4\] is not supported; only \[2\] is"):
        load(folder)


@pytest.mark.parametrize("shift", [0, -3, math.nan])
def test_the_shift_of_the_scheduler(folder: Path, shift: float) -> None:
    shutil.copytree(folder, folder.parent / "good")
    edit(folder / "scheduler" / "scheduler_config.json", shift=shift)
    all_refuse(folder, "is not a positive number")


@pytest.mark.parametrize("part", ["tokenizer", "scheduler", "vae"])
def test_a_component_that_is_not_there(folder: Path, part: str) -> None:
    shutil.rmtree(folder / part)
    with pytest.raises(UserError, match=f"{part}: no such folder; the model is incomplete"):
        load(folder)


def test_an_initialization_with_other_latents_or_shapes(folder: Path, tiny_folder: Path) -> None:
    recipe = load_recipe("micro-aligned", [f"init={folder}"])
    build_models(recipe, load(tiny_folder))
    edit(folder / "vae" / "config.json", scaling_factor=0.5)
    with pytest.raises(UserError, match=r"init: .*model has other latents: scaling_factor is 0.5 in its vae/config"):
        build_models(recipe, load(tiny_folder))
    with pytest.raises(UserError, match=r"init: micro (has other latents|does not have the teacher's architecture)"):
        build_models(load_recipe("micro-aligned", ["init=micro"]), load(tiny_folder))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:1", "mps", "graphics card"])
def test_devices_that_are_not_there(tiny: TextToImagePipeline, tiny_folder: Path, device: str) -> None:
    for open_on in (lambda: load(tiny_folder, device), lambda: load_prompt_encoder(tiny_folder, device)):
        with pytest.raises(UserError, match=f"device {device}: not a"):
            open_on()
    with pytest.raises(UserError, match=f"device {device}: not a"):
        tiny.to(device)
    assert FILES.keys() <= tiny.components.keys()
    assert tiny.device == torch.device("cpu")
