"""The command line in tests of LoRA files, and two files that it takes."""

import lora_files as made
import pytest
from typer.testing import CliRunner

from fewstep.cli.main import app
from fewstep.models.lora.metadata import lora_metadata


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})


def succeed(*words):
    done = run(*words)
    assert done.exit_code == 0, done.output
    return done


@pytest.fixture
def character(tiny, tmp_path):
    return made.save(tmp_path / "character.safetensors", made.kohya(made.adapter_for(tiny.transformer, seed=1)))


@pytest.fixture
def style(tiny, tmp_path):
    adapter = made.adapter_for(tiny.transformer, made.LAYERS[:5], rank=2, seed=2)
    return made.save(tmp_path / "style.safetensors", made.fused(adapter)[0], lora_metadata("style", kind="base"))
