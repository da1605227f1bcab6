"""LoRA files that requests name: checked at the start, swapped to the bit, in batches of their own."""

from __future__ import annotations

import base64
import io
import shutil
from concurrent.futures import ThreadPoolExecutor

import lora_files as made
import openai
import pytest
import torch
from lora_cli import run, succeed
from PIL import Image
from safetensors.torch import save_file
from serve_setup import make_service, pixels, running

from fewstep.errors import UserError
from fewstep.inference.generate import generate
from fewstep.inference.params import SamplingParams
from fewstep.models.fingerprint import model_fingerprint
from fewstep.models.lora.merge import read_loras
from fewstep.models.lora.swap import LoraSwap
from fewstep.models.lora.targets import targets_of
from fewstep.models.pipeline import load
from fewstep.models.zimage.family import ZIMAGE
from fewstep.serve.loras import LoraFolder

FAST = {"seed": 3, "steps": 2}


def write_loras(tiny, folder):
    made.save(folder / "character.safetensors", made.kohya(made.adapter_for(tiny.transformer, seed=1)))
    adapter = made.adapter_for(tiny.transformer, made.LAYERS[:5], rank=2, seed=2)
    made.save(folder / "style.safetensors", made.fused(adapter)[0])
    return folder


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    return write_loras(tiny, tmp_path_factory.mktemp("loras"))


@pytest.fixture(scope="module")
def server(tiny, tiny_folder, folder):
    loras = LoraFolder(folder, targets_of(tiny.transformer, ZIMAGE))
    with running(make_service(load(tiny_folder, "cpu"), loras=loras)) as server:
        yield server


def image(server, **lora):
    (made_image,) = server.images("a dog", extra={**FAST, "lora": lora})
    return pixels(made_image)


def test_images_are_those_of_the_command(server, tiny, tiny_folder, folder, tmp_path):
    """One LoRA, two, another strength, and none again: to the last bit."""
    base = generate(tiny, ["a dog"], SamplingParams(**FAST)).images[0]
    for lora in ({"character": 0.8}, {"style": 0.6, "character": -0.5}, {"style": 0.0}, {}):
        words = [word for name, s in lora.items() for word in ("--lora", f"{folder / name}.safetensors:{s}")]
        out = tmp_path / "command.png"
        succeed("generate", tiny_folder, "a dog", "--seed", 3, "--steps", 2, "-o", out, *words)
        drawn = image(server, **lora)
        assert torch.equal(drawn, pixels(Image.open(out))), lora
        assert torch.equal(drawn, base) == (not any(lora.values()))
    (model,) = server.client.models.list().data
    assert model.loras == ["character", "style"]


def test_requests_share_batches_with_their_like_alone(server, tiny_folder, folder):
    sizes = []
    observe = server.service.engine.observe
    server.service.engine.observe = lambda images, seconds: (sizes.append(images), observe(images, seconds))
    wanted = [{"character": 0.8}, {}, {"character": 0.4}, {"character": 0.8, "style": 1.0}] * 3
    with ThreadPoolExecutor(len(wanted)) as threads:
        drawn = list(threads.map(lambda lora: image(server, **lora), wanted))
    for index, lora in enumerate(wanted[:4]):
        files = {str(folder / f"{name}.safetensors"): strength for name, strength in lora.items()}
        (expected,) = generate(load(tiny_folder, "cpu", loras=files), ["a dog"], SamplingParams(**FAST)).images
        assert all(torch.equal(each, expected) for each in drawn[index::4])
    assert sum(sizes) == 12
    assert max(sizes) <= 3


def test_an_image_of_the_server_is_made_again_by_the_command(server, tiny_folder, folder, tmp_path):
    server.service.fingerprint = model_fingerprint(tiny_folder)
    answer = server.client.images.generate(prompt="a dog", extra_body={**FAST, "lora": {"character": 0.8}})
    file, again = tmp_path / "served.png", tmp_path / "again.png"
    file.write_bytes(base64.b64decode(answer.data[0].b64_json))
    done = run("generate", tiny_folder, "--from", file, "-o", again)
    assert "was made with character, which is not there or has changed; give --lora FILE:0.8" in done.stderr
    lora = f"{folder / 'character.safetensors'}:0.8"
    succeed("generate", tiny_folder, "--from", file, "--lora", lora, "-o", again)
    assert torch.equal(pixels(Image.open(file)), pixels(Image.open(again)))
    succeed("generate", "--from", again, "-o", tmp_path / "third.png")
    assert (tmp_path / "third.png").read_bytes() == again.read_bytes()


def test_edits_take_loras_as_json(server):
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), (200, 30, 30)).save(buffer, "PNG")
    drawn = [
        server.client.images.edit(
            image=("a.png", buffer.getvalue()), prompt="a fox", extra_body={**FAST, "lora": lora}
        ).data[0]
        for lora in ("{}", '{"character": 0.8}')
    ]
    assert drawn[0].b64_json != drawn[1].b64_json
    with pytest.raises(openai.BadRequestError, match="lora: expected JSON"):
        server.client.images.edit(image=("a.png", buffer.getvalue()), prompt="a fox", extra_body={"lora": "character"})


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"nobody": 1}, "lora: 'nobody' is not known; there are character, style"),
        ({"../character": 1}, "lora: '../character' is not known"),
        ({"character": 11}, "lora.character: Input should be less than or equal to 10"),
        ({"character": "much"}, "lora.character: Input should be a valid number"),
        ({"character": True}, "lora: expected a number"),
        ({str(index): 1 for index in range(9)}, "lora: Dictionary should have at most 8 items"),
        ("character", "lora: Input should be a valid dictionary"),
    ],
)
def test_mistakes(server, lora, message):
    with pytest.raises(openai.BadRequestError) as failed:
        server.client.images.generate(prompt="a fox", extra_body={"lora": lora})
    assert message in failed.value.body["message"]


def test_little_memory_keeps_the_last_file_and_notices_changes(tiny, tmp_path):
    folder = write_loras(tiny, tmp_path)
    loras = LoraFolder(folder, targets_of(tiny.transformer, ZIMAGE), capacity=1)
    both = loras.check({"style": 1.0, "character": 1.0})
    assert [lora.file.stem for lora, _ in loras.get(both)] == ["character", "style"]
    made.save(folder / "character.safetensors", made.kohya(made.adapter_for(tiny.transformer, seed=9)))
    with pytest.raises(UserError, match="'character' has changed since this server started"):
        loras.get(both)


def test_an_error_in_a_swap_leaves_the_next_one_right(tiny_folder, tiny, folder, monkeypatch):
    import fewstep.models.lora.swap as module

    pipeline = load(tiny_folder, "cpu")
    loras = read_loras({str(folder / "character.safetensors"): 0.8}, targets_of(tiny.transformer, ZIMAGE))
    swap, merge = LoraSwap(pipeline.transformer), module.merge_

    def interrupted(transformer, weighted):
        merge(transformer, weighted)
        raise MemoryError

    monkeypatch.setattr(module, "merge_", interrupted)
    with pytest.raises(MemoryError):
        swap.set(loras)
    monkeypatch.undo()
    swap.set([])
    for name, weight in pipeline.transformer.state_dict().items():
        assert torch.equal(weight, tiny.transformer.state_dict()[name])


def test_folders_are_checked_at_the_start(tiny, tmp_path):
    folder = write_loras(tiny, tmp_path)
    targets = targets_of(tiny.transformer, ZIMAGE)
    (folder / "notes.txt").write_text("not a LoRA")
    (folder / "style").mkdir()
    made.save(folder / "style" / "any.safetensors", made.kohya(made.adapter_for(tiny.transformer)))
    with pytest.raises(UserError, match="has the same name, style; rename one"):
        LoraFolder(folder, targets)
    shutil.rmtree(folder / "style")
    save_file({"weird": torch.ones(2)}, folder / "other.safetensors")
    with pytest.raises(UserError, match=r"other\.safetensors: no LoRA"):
        LoraFolder(folder, targets)
