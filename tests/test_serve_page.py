"""The web page in a real browser: type, generate, see an image, reload, cancel."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image
from serve_setup import make_service, running

from fewstep.inference.image_metadata import read_metadata
from fewstep.serve.settings import ApiKeys

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")]


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    page = browser.new_page()
    page.set_default_timeout(60_000)
    page.problems = []
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("console", lambda message: page.problems.append(message.text) if message.type == "error" else None)
    yield page
    page.close()


@pytest.fixture(scope="module")
def server(tiny):
    with running(make_service(tiny)) as server:
        yield server


def generate(page, prompt="a fox", **fields):
    page.fill("#prompt", prompt)
    for name, value in fields.items():
        page.fill(f"#{name}", str(value))
    page.click("#generate")


def cards(page):
    return page.locator(".card:not(.pending)")


def test_generate_look_download_and_reload(server, page, tmp_path):
    page.goto(server.url)
    assert page.locator("#model").inner_text() == "tiny"
    assert page.input_value("#steps") == "6"
    generate(page, "一只狐狸 <b>bold</b>", count=2, steps=8)
    sync_api.expect(cards(page)).to_have_count(2, timeout=60_000)
    sync_api.expect(page.locator("#status")).to_contain_text("Done in")
    cards(page).first.click()
    assert page.locator("#caption").inner_text() == "一只狐狸 <b>bold</b>"
    with page.expect_download() as download:
        page.click("#download")
    download.value.save_as(tmp_path / "fox.png")
    made = read_metadata(tmp_path / "fox.png")
    assert (made.prompt, made.params.steps, made.params.width) == ("一只狐狸 <b>bold</b>", 8, 64)
    assert Image.open(tmp_path / "fox.png").size == (64, 64)
    page.click("#close")
    page.reload()
    sync_api.expect(cards(page)).to_have_count(2)
    assert page.input_value("#prompt") == "一只狐狸 <b>bold</b>"
    assert page.evaluate("[...document.querySelectorAll('.card img')].every(image => image.naturalWidth === 64)")
    cards(page).first.click()
    page.click("#remove")
    sync_api.expect(cards(page)).to_have_count(1)
    page.reload()
    sync_api.expect(cards(page)).to_have_count(1)
    assert page.problems == []


def test_partial_images_appear_and_a_locked_seed_repeats_the_image(server, page):
    page.goto(server.url)
    page.check("#lock")
    seen = "new Promise(done => new MutationObserver((_, o) => { if (document.querySelector('.card.pending img')) {"
    seen += " o.disconnect(); done(true) } }).observe(document.body, {subtree: true, childList: true}))"
    page.evaluate(f"void (window.partial = {seen})")
    generate(page, seed=7, steps=40)
    assert page.evaluate("window.partial")
    sync_api.expect(cards(page)).to_have_count(1, timeout=60_000)
    generate(page, steps=40)
    sync_api.expect(cards(page)).to_have_count(2, timeout=60_000)
    stored = """new Promise(done => { const open = indexedDB.open("fewstep"); open.onsuccess = () => {
        const all = open.result.transaction("images").objectStore("images").getAll();
        all.onsuccess = async () => done(await Promise.all(all.result.map(each => each.blob.text()))) } })"""
    first, second = page.evaluate(stored)
    assert first == second
    assert page.problems == []


def test_cancel_stops_the_work(server, page):
    page.goto(server.url)
    generate(page, steps=100, count=4)
    sync_api.expect(page.locator("#status")).to_contain_text("Step")
    page.click("#cancel")
    sync_api.expect(page.locator("#status")).to_have_text("Canceled")
    sync_api.expect(page.locator(".card")).to_have_count(0)
    generate(page, "a cat", steps=1, count=1)
    sync_api.expect(cards(page)).to_have_count(1, timeout=60_000)
    assert page.problems == []


def test_mistakes_are_shown(server, page):
    page.goto(server.url)
    generate(page, "fox " * 900)
    sync_api.expect(page.locator("#status.error")).to_contain_text("at most 512 fit")
    sync_api.expect(page.locator(".card")).to_have_count(0)


def test_the_key_is_wanted_where_there_are_keys(tiny, page):
    with running(make_service(tiny), ApiKeys({"0123456789abcdef": "ann"})) as server:
        page.goto(server.url)
        page.fill("#key", "0123456789abcdef")
        page.press("#key", "Tab")
        sync_api.expect(page.locator("#model")).to_have_text("tiny")
        generate(page, steps=1)
        sync_api.expect(cards(page)).to_have_count(1, timeout=60_000)


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_and_follows_the_system(server, browser, width, scheme, tmp_path: Path):
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page.goto(server.url)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    bright = sum(
        int(part)
        for part in page.evaluate(
            "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).join(' ')"
        ).split()
    )
    assert (bright > 384) == (scheme == "light")
    page.close()
