"""Streams of real latents and images: complete, decoded as the model's own, and divided between processes."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lora_training import image_set
from PIL import Image
from real_setup import SHAPE, SIDE, image_bytes, image_of, latent_of, npy, prompt_of, write_latents
from safetensors.torch import save
from stream_setup import write_tar
from wan_setup import save_wan

from fewstep.config.sections import RealStreamSettings
from fewstep.core.method import Shard
from fewstep.data import stream_batches
from fewstep.data.images import to_pil
from fewstep.data.real_batches import RealBatches
from fewstep.data.real_stream import open_real_stream, shard_files
from fewstep.data.training_set.reading import read_training_set
from fewstep.errors import UserError
from fewstep.models.pipeline import load

__all__ = ["image_set"]  # a fixture


@pytest.fixture(autouse=True)
def few_ahead(monkeypatch):
    monkeypatch.setattr(stream_batches, "ENCODED", 8)


def source_of(model, path, workers=0, buffer=8, held_out=(), size=4, seed=0):
    settings = RealStreamSettings(num_workers=workers, shuffle_buffer=buffer)
    return RealBatches(model, open_real_stream(model, str(path), "prompt", settings, held_out), size, seed)


def batches(source, count, shard=Shard()):  # noqa: B008
    return [source(position, shard) for position in range(count)]


def pairs(found):
    """(number of the prompt, latent) of each row."""
    return [
        (int(text.rpartition(" ")[2]), row)
        for batch in found
        for text, row in zip(batch.texts, batch.real, strict=True)
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_has_each_latent_with_its_prompt(tmp_path, tiny, workers):
    found = batches(source_of(tiny, write_latents(tmp_path / "data"), workers), 10)
    numbers = [number for number, _ in pairs(found)]
    assert sorted(numbers) == list(range(40))
    assert numbers != sorted(numbers)
    for number, latent in pairs(found):
        assert torch.equal(latent, latent_of(number))
    expected = tiny.encoder(list(found[0].texts))
    torch.testing.assert_close(found[0].prompts.features, expected.features, atol=1e-5, rtol=1e-5)
    assert found[0].states.shape == (4, 1, *SHAPE)
    assert found[0].noise.shape == (4, *SHAPE)


@pytest.mark.parametrize("shards", [4, 3])
def test_processes_read_different_samples(tmp_path, tiny, shards):
    path = write_latents(tmp_path / "data", shards, count=8)
    parts = [batches(source_of(tiny, path), 2 * shards, Shard(rank, 2)) for rank in range(2)]
    first, second = ({number for number, _ in pairs(part)} for part in parts)
    assert len(first) == len(second) == 4 * shards
    assert first | second == set(range(8 * shards))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_stream_equals_an_uninterrupted_one(tmp_path, tiny, workers):
    """Latents and images, from within what was read ahead, at its end, and in the second epoch."""
    images = [(f"{i}.{end}", data) for i in range(40, 50) for end, data in _image_sample(i).items()]
    write_latents(tmp_path / "data")
    write_tar(tmp_path / "data" / "images.tar", images)
    path = tmp_path / "data"
    whole = batches(source_of(tiny, path, workers), 20)
    for cut in (2, 15) if workers else (1, 2, 3, 13, 15):
        begun = source_of(tiny, path, workers)
        batches(begun, cut)
        resumed = source_of(tiny, path, workers)
        resumed.load_state_dict(json.loads(json.dumps(begun.state_dict())))
        for position in range(cut, cut + 5):
            found, expected = resumed(position, Shard()), whole[position]
            assert found.texts == expected.texts
            assert torch.equal(found.states, expected.states)
            assert torch.equal(found.noise, expected.noise)
            assert torch.equal(found.prompts.features, expected.prompts.features)


def _image_sample(number, kind="png", size=(SIDE, SIDE)):
    return {kind: image_bytes(number, kind, size), "txt": prompt_of(number)}


def test_images_are_encoded_as_the_model_encodes_them(tmp_path, tiny):
    """Beside a latent in the same batch."""
    samples = {0: {"npy": npy(latent_of(0)), "txt": prompt_of(0)}, 1: _image_sample(1), 2: _image_sample(2, "jpg")}
    samples[3] = _image_sample(3, "webp", (200, 100))
    members = [(f"{i}.{end}", data) for i, sample in samples.items() for end, data in sample.items()]
    path = write_tar(tmp_path / "a.tar", members)
    found = dict(pairs(batches(source_of(tiny, path), 1)))

    def expected(image):
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].float() / 255
        with torch.no_grad():
            return tiny.encode_images(pixels)[0]

    def opened(number):
        sample = samples[number]
        return Image.open(io.BytesIO(sample[next(name for name in sample if name != "txt")]))

    assert torch.equal(found[0], latent_of(0))
    torch.testing.assert_close(found[1], expected(image_of(1)), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[2], expected(opened(2)), atol=1e-4, rtol=1e-4)
    middle = opened(3).convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS, box=(50, 0, 150, 100))
    torch.testing.assert_close(found[3], expected(middle), atol=1e-4, rtol=1e-4)


def test_images_are_cropped_in_the_middle(tmp_path, tiny):
    wide = image_of(5, (192, 64))
    members = [("5.png", image_bytes(5, "png", (192, 64))), ("5.txt", prompt_of(5))]
    stream = open_real_stream(
        tiny, str(write_tar(tmp_path / "a.tar", members)), "prompt", RealStreamSettings(), held_out=()
    )
    pixels = next(iter(stream.loader(0, Shard()))).pixels
    assert pixels.dtype == torch.uint8
    assert to_pil(pixels.permute(1, 2, 0)).tobytes() == wide.crop((64, 0, 128, 64)).tobytes()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_latents_of_every_precision(tmp_path, tiny, dtype):
    latent = latent_of(7).to(dtype)
    members = [("a.safetensors", save({"x": latent})), ("a.txt", prompt_of(7))]
    if dtype != torch.bfloat16:
        members += [("b.npy", npy(latent)), ("b.txt", prompt_of(7))]
    for _, real in pairs(batches(source_of(tiny, write_tar(tmp_path / "a.tar", members)), 1)):
        assert real.dtype == torch.float32
        assert torch.equal(real, latent.float())


def test_latents_of_videos(tmp_path):
    model = load(save_wan(tmp_path / "wan"), "cpu")
    model.set_size(32, 5)
    shape = model.latent_shape(32, 32, 5)
    members = [("a.npy", npy(latent_of(3, shape))), ("a.txt", "a fox")]
    found = batches(source_of(model, write_tar(tmp_path / "a.tar", members), size=1), 1)[0]
    assert len(shape) == 4
    assert found.noise.shape == (1, *shape)
    assert torch.equal(found.real[0], latent_of(3, shape))


def test_a_latent_is_read_before_an_image_and_each_prompt_is_a_sample(tmp_path, tiny):
    members = [("a.png", image_bytes(1)), ("a.npy", npy(latent_of(1))), ("a.cls", "3")]
    members += [("a.json", json.dumps({"prompt": ["one 1", "two 1", " "]}))]
    found = batches(source_of(tiny, write_tar(tmp_path / "a.tar", members)), 2)
    assert sorted(text for batch in found for text in batch.texts) == ["one 1"] * 4 + ["two 1"] * 4
    assert all(torch.equal(real, latent_of(1)) for _, real in pairs(found))


def test_samples_of_held_out_prompts_are_left_out(tmp_path, tiny):
    path = write_latents(tmp_path / "data")
    held_out = [prompt_of(number).upper() for number in range(4)]
    numbers = [number for number, _ in pairs(batches(source_of(tiny, path, held_out=held_out), 9))]
    assert sorted(numbers) == list(range(4, 40))
    every = [prompt_of(number) for number in range(40)]
    with pytest.raises(UserError, match=r"latents-\{000..003\}.tar: no samples to train on in it"):
        source_of(tiny, path, held_out=every)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_mistake_in_a_later_sample_is_one_line(tmp_path, tiny, workers):
    """Found where the sample is read, in a worker too, and only the first sample before the training."""
    members = [(f"{i}.{end}", data) for i in range(5) for end, data in _image_sample(i).items()]
    members += [("bad.npy", npy(latent_of(0, (16, 8, 4)))), ("bad.txt", "a fox")]
    source = source_of(tiny, write_tar(tmp_path / "a.tar", members), workers)
    with pytest.raises(UserError) as error:
        batches(source, 1)
    assert str(error.value) == (
        f"{tmp_path}/a.tar, sample bad, .npy: a latent of shape [16, 8, 4], where the model's has [16, 8, 8] at 64x64; "
        "encode the images with this model at this size, or set resolution"
    )


def test_pickled_arrays_are_never_loaded(tmp_path, tiny):
    class Harmful:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())

    content = io.BytesIO()
    np.save(content, np.array([Harmful()], dtype=object), allow_pickle=True)
    path = write_tar(tmp_path / "a.tar", [("a.npy", content.getvalue()), ("a.txt", "a fox")])
    with pytest.raises(UserError, match=r"sample a, .npy: cannot be read \(Object arrays cannot be loaded"):
        source_of(tiny, path)
    assert not (tmp_path / "ran").exists()


def test_the_shards_of_a_source(tmp_path):
    write_latents(tmp_path / "data", 2)
    (tmp_path / "data" / "notes.txt").write_text("mine")
    (tmp_path / "data" / ".hidden.tar").write_bytes(b"")
    expected = [tmp_path / "data" / f"latents-00{number}.tar" for number in range(2)]
    assert shard_files(f"{tmp_path}/data/latents-{{000..001}}.tar") == expected
    assert shard_files(str(tmp_path / "data")) == expected
    assert shard_files(str(expected[1])) == expected[1:]
    with pytest.raises(UserError, match=r"\(missing: .*latents-002.tar\)"):
        shard_files(f"{tmp_path}/data/latents-{{000..002}}.tar")


def test_the_guide_writes_shards_of_a_training_set(tmp_path, tiny, tiny_folder, image_set, monkeypatch):
    guide = (Path(__file__).parent.parent / "docs" / "guides" / "real-data.md").read_text()
    code = guide.partition("```python\n")[2].partition("```")[0]
    for named, own in [("Tongyi-MAI/Z-Image", tiny_folder), ("1024", SIDE), ("runs/set", image_set)]:
        assert named in code
        code = code.replace(named, str(own))
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    images = read_training_set(image_set).images
    with torch.no_grad():
        expected = {one.caption: tiny.encode_images(one.pixels((SIDE, SIDE))[None])[0] for one in images}
    found = batches(source_of(tiny, tmp_path, size=len(images)), 1)[0]
    assert sorted(found.texts) == sorted(expected)
    for text, latent in zip(found.texts, found.real, strict=True):
        torch.testing.assert_close(latent, expected[text], atol=1e-2, rtol=1e-3)


def test_an_archive_of_a_folder_is_a_shard(tmp_path, tiny):
    (tmp_path / "photos").mkdir()
    for number in range(3):
        (tmp_path / "photos" / f"{number}.png").write_bytes(image_bytes(number))
        (tmp_path / "photos" / f"{number}.txt").write_text(prompt_of(number))
    subprocess.run(["tar", "--sort=name", "-cf", "images-000.tar", "photos"], cwd=tmp_path, check=True)
    found = batches(source_of(tiny, tmp_path / "images-000.tar", size=3), 1)[0]
    assert sorted(found.texts) == [prompt_of(number) for number in range(3)]


@pytest.mark.parametrize("module", ["torchdata.stateful_dataloader", "datasets", "webdataset.tariterators"])
def test_missing_packages_are_named_with_the_extra(tmp_path, monkeypatch, module):
    path = write_latents(tmp_path / "data", 1)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"{module.split('.')[0]}.*; pip install 'fewstep\[stream\]'"):
        shard_files(path)
