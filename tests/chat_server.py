"""A server in OpenAI's chat format, whose answers a test plans."""

import base64
import io
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image


class Server(ThreadingHTTPServer):
    """Grades an image by its brightness; ``plan`` holds (status, body or None, seconds) of the next replies."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[dict] = []
        self.keys: list[str | None] = []
        self.plan: list[tuple[int, str | None, float]] = []
        self.lock = threading.Lock()

    @property
    def spec(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1#tiny-vlm"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append(body)
            self.server.keys.append(self.headers["Authorization"])
            status, text, seconds = self.server.plan.pop(0) if self.server.plan else (200, None, 0.0)
        time.sleep(seconds)
        if text is None:
            url = body["messages"][1]["content"][1]["image_url"]["url"]
            image = Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,"))))
            text = f"I give it {round(image.convert('L').getpixel((0, 0)) / 25.5)}."
        reply = (
            json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}) if status == 200 else text
        )
        try:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(reply.encode())
        except BrokenPipeError:
            pass  # the client gave up

    def log_message(self, *args: object) -> None: ...


@contextmanager
def running_chat() -> Iterator[Server]:
    """Inside, the server answers."""
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
