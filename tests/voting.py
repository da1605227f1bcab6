"""A folder of images to vote on, and requests to the voting page."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from threading import Thread
from typing import Any

from PIL import Image

from fewstep.preferences.schedule import Comparison, schedule
from fewstep.preferences.server import VotingServer
from fewstep.preferences.session import VotingSession
from fewstep.preferences.vote_log import VoteLog

PROMPTS = ["a red fox", "两只猫", "a <b>bold</b> & green frog", "four ducks"]
LABELS = ("teacher-model", "student-model")


def write_images(folder: Path, labels: tuple[str, ...] = LABELS, prompts: int = len(PROMPTS)) -> None:
    """One image for each model and prompt, of a color of its own: red is the model's number, green the prompt's."""
    for number, label in enumerate(labels):
        (folder / "images" / label).mkdir(parents=True)
        for prompt in range(prompts):
            color = (50 + 100 * number, 10 * prompt, 0)
            Image.new("RGB", (32, 32), color).save(folder / "images" / label / f"{prompt:04d}.png")


@contextmanager
def serving(
    folder: Path, comparisons: list[Comparison] | None = None, voter: str = "human"
) -> Iterator[tuple[VotingServer, VotingSession]]:
    """A running server on a free port."""
    comparisons = comparisons or schedule(LABELS, len(PROMPTS), 0)
    with VotingServer(0) as server, VoteLog(folder / "votes.jsonl") as log:
        server.session = session = VotingSession(log, comparisons, PROMPTS, voter)
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server, session
        finally:
            server.shutdown()
            thread.join()


class Client:
    """Requests to a port; keeps all that it received."""

    def __init__(self, port: int) -> None:
        self.connection, self.received = HTTPConnection("127.0.0.1", port, timeout=30), b""

    def __call__(
        self, method: str, path: str, body: bytes | None = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of the answer."""
        self.connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        answer = self.connection.getresponse()
        content, found = answer.read(), dict(answer.getheaders())
        self.received += json.dumps([path, found]).encode() + content
        return answer.status, found, content

    def state(self) -> dict[str, Any]:
        return json.loads(self("GET", "/state")[2])

    def post(self, path: str, **body: Any) -> tuple[int, dict[str, Any]]:
        status, _, content = self("POST", path, json.dumps(body).encode(), Content_Type="application/json")
        return status, json.loads(content)
