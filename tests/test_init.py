"""A student's starting point."""

import shutil

import pytest
import torch

from fewstep.config.load import load_recipe
from fewstep.emoji.recipes import TransformerSettings
from fewstep.emoji.train_flow_matching import build_transformer
from fewstep.errors import UserError
from fewstep.methods.models_setup import build_models, load_init
from fewstep.models.pipeline import load


@pytest.fixture
def transformer_alone(tiny_folder, tmp_path):
    """A model's folder with other weights in its transformer, and of its autoencoder the configuration alone."""
    model = load(tiny_folder, "cpu")
    with torch.no_grad():
        for parameter in model.transformer.parameters():
            parameter.add_(0.5)
    folder = model.save(tmp_path / "start")
    for name in ("text_encoder", "tokenizer", "scheduler"):
        shutil.rmtree(folder / name)
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    return folder


def test_only_the_transformer_of_init_is_loaded(tiny_folder, transformer_alone):
    teacher = load(tiny_folder, "cpu")
    recipe = load_recipe("micro-decoupled", [f"teacher={tiny_folder}", f"init={transformer_alone}"])
    models = build_models(recipe, teacher, ["fake_score"])
    theirs = models.teacher.transformer.state_dict()
    for name, weight in models.student.transformer.state_dict().items():
        assert torch.allclose(weight, theirs[name] + 0.5)
    for name, weight in models.extra["fake_score"].transformer.state_dict().items():
        assert torch.equal(weight, theirs[name])


def test_init_of_another_architecture_is_one_line(tiny, tiny_folder):
    settings = TransformerSettings(dim=96, n_layers=2, n_refiner_layers=1, n_heads=2, axes_dims=(16, 16, 16))
    other = tiny.with_transformer(build_transformer(settings, 32, 16), tiny.generation_config)
    with pytest.raises(UserError, match="does not have the teacher's architecture") as raised:
        load_init(other, str(tiny_folder))
    assert "\n" not in str(raised.value)
    assert str(raised.value).startswith(f"init: {tiny_folder} ")
