"""The voting page in a real browser, and a server that is killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import chromium
import pytest
from chromium import Chromium
from voting import LABELS, PROMPTS, Client, serving, write_images

from fewstep.data.preferences import read_votes
from fewstep.preferences.schedule import schedule

READY = "document.body?.dataset.ready"
COUNT = "document.getElementById('count').textContent"


def wait_for(browser: Chromium, done: int) -> None:
    browser.wait(f"{READY} && {COUNT} === '{done} of {len(PROMPTS)}'")


@pytest.mark.slow
@pytest.mark.skipif(chromium.PROGRAM is None, reason="there is no Chromium here")
def test_page_in_a_browser(tmp_path: Path) -> None:
    write_images(tmp_path / "votes")
    order = schedule(LABELS, len(PROMPTS), 0)
    with serving(tmp_path / "votes", order) as (server, session), Chromium(tmp_path / "profile") as browser:
        browser.resize(1280, 800)
        browser.open(server.url)
        wait_for(browser, 0)
        assert browser.value("document.getElementById('prompt').textContent") == PROMPTS[order[0].prompt]
        assert browser.value("[...document.images].map(image => image.naturalWidth).join()") == "32,32"
        tops = "[...document.images].map(image => Math.round(image.getBoundingClientRect().top)).join()"
        first, second = browser.value(tops).split(",")
        assert first == second  # beside each other
        for done, key in enumerate("12", start=1):
            browser.press(key)
            wait_for(browser, done)
        assert [vote.choice for vote in read_votes(tmp_path / "votes")] == ["left", "right"]
        browser.press("u")
        wait_for(browser, 1)
        browser.press("0")
        wait_for(browser, 2)
        assert [vote.choice for vote in read_votes(tmp_path / "votes")] == ["left", "tie"]
        html = browser.value("document.documentElement.outerHTML")
        assert [label for label in LABELS if label in html] == []

        browser.resize(390, 844, phone=True, dark=True)  # one image below the other, nothing to scroll
        assert browser.value("getComputedStyle(document.body).backgroundColor") == "rgb(22, 22, 21)"
        first, second = map(int, browser.value(tops).split(","))
        assert second > first + 200
        assert browser.value("document.documentElement.scrollHeight <= innerHeight")
        assert browser.value("document.documentElement.scrollWidth <= innerWidth")
        browser.tap("#right")
        wait_for(browser, 3)
        browser.tap("nav [data-choice=left]")
        browser.wait(f"{READY} === 'end'")
        assert [vote.choice for vote in read_votes(tmp_path / "votes")] == ["left", "tie", "right", "left"]
        assert browser.value("document.getElementById('end').hidden") is False
        browser.tap("#undo")
        wait_for(browser, 3)
        assert session.done == 3


@pytest.mark.slow
@pytest.mark.skipif(chromium.PROGRAM is None, reason="there is no Chromium here")
def test_no_vote_on_an_image_that_cannot_be_seen(tmp_path: Path) -> None:
    write_images(tmp_path / "votes")
    first = schedule(LABELS, len(PROMPTS), 0)[0]
    (tmp_path / "votes" / "images" / first.left / f"{first.prompt:04d}.png").write_bytes(b"damaged")
    with serving(tmp_path / "votes") as (server, session), Chromium(tmp_path / "profile") as browser:
        browser.open(server.url)
        browser.wait("document.getElementById('error')?.textContent.startsWith('An image cannot be loaded')")
        browser.press("1")
        browser.value("new Promise(done => setTimeout(done, 300))")
        assert session.done == 0


@contextmanager
def collecting(folder: Path, model: Path, port: int = 0) -> Iterator[int]:
    """The real program, which is killed at the end; yields its port."""
    (folder / "prompts.txt").write_text("a fox\ntwo foxes\nthree foxes\n", encoding="utf-8")
    words = [str(model), f"few={model}@steps=1,guidance_scale=0", "--prompts", "prompts.txt", "--out", "votes"]
    command = [sys.executable, "-m", "fewstep", "prefs", "collect", *words, "--steps", "2", "--port", str(port)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        line = process.stdout.readline()
        found = re.match(r"vote on http://127\.0\.0\.1:(\d+)/ ", line)
        assert found, (line, process.stderr.read())
        try:
            yield int(found.group(1))
        finally:
            process.send_signal(signal.SIGKILL)


def images(folder: Path) -> dict[Path, int]:
    """Every image with the time at which it was written."""
    return {file: file.stat().st_mtime_ns for file in folder.glob("votes/images/*/*.png")}


def test_a_killed_program_loses_no_vote(tiny_folder: Path, tmp_path: Path) -> None:
    """kill -9 right after an answer."""
    with collecting(tmp_path, tiny_folder) as port:
        client = Client(port)
        for done in range(2):
            state = client.state()
            assert (state["done"], state["total"]) == (done, 3)
            status, _ = client.post("/vote", pair=state["pair"], choice="left")
            assert status == 200
    assert len(read_votes(tmp_path / "votes")) == 2
    assert {path.parent.name for path in images(tmp_path)} == {tiny_folder.name, "few"}
    assert len(images(tmp_path)) == 6


@pytest.mark.slow
@pytest.mark.skipif(chromium.PROGRAM is None, reason="there is no Chromium here")
def test_a_window_continues_after_a_kill(tiny_folder: Path, tmp_path: Path) -> None:
    """The same command again makes no image again, and the page that is still open continues with it."""
    with Chromium(tmp_path / "profile") as browser:
        with collecting(tmp_path, tiny_folder) as port:
            browser.open(f"http://127.0.0.1:{port}/")
            browser.wait(f"{READY} && {COUNT} === '0 of 3'")
            browser.press("1")
            browser.wait(f"{READY} && {COUNT} === '1 of 3'")
            made = images(tmp_path)
        browser.press("1")
        browser.wait("document.getElementById('error').textContent.includes('Your votes are kept')")
        with collecting(tmp_path, tiny_folder, port):
            browser.wait(f"{READY} && document.getElementById('error').textContent === ''")
            browser.press("2")
            browser.wait(f"{READY} && {COUNT} === '2 of 3'")
    assert [vote.choice for vote in read_votes(tmp_path / "votes")] == ["left", "right"]
    assert images(tmp_path) == made
