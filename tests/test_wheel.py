"""The wheel installs into an environment of its own and has its recipes, models and web page."""

import os
import shutil
import site
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from fewstep import api

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "fewstep"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy of what a source distribution has, without network."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", str(folder), str(source)], check=True)
    (built,) = folder.glob("fewstep-*.whl")
    return built


@pytest.mark.slow
def test_the_wheel_has_every_file_of_the_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
    files = [each for each in PACKAGE.rglob("*") if each.is_file() and "__pycache__" not in each.parts]
    assert len(files) > 300
    missing = [name for each in files if (name := f"fewstep/{each.relative_to(PACKAGE).as_posix()}") not in packed]
    assert missing == []


@pytest.mark.slow
def test_the_installed_command_generates_with_the_bundled_student(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "env"
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(wheel)], check=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    # The dependencies of this environment; its .pth files, that of an editable fewstep among them, have no effect here.
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()))
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    show = [str(python), "-c", "import fewstep; print(fewstep.__file__)"]
    found = subprocess.run(show, capture_output=True, text=True, cwd=tmp_path, env=own)
    assert Path(found.stdout.strip()).is_relative_to(environment)
    words = [str(environment / "bin" / "fewstep"), "generate", "micro-turbo"]
    prompt = "a noto emoji of a red apple on a blue background"
    subprocess.run([*words, prompt, "-o", "apple.png", "--seed", "1"], check=True, cwd=tmp_path, env=own)
    with Image.open(tmp_path / "apple.png") as image:
        drawn = image.convert("RGB")
    expected = api.generate(api.load("micro-turbo"), [prompt], seed=1).images[0]
    assert drawn.tobytes() == expected.numpy().tobytes()
