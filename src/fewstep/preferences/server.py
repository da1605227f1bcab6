"""The voting page and its requests, on this machine alone.

    GET  /            the page
    GET  /state       the pair that is shown, and the progress
    GET  /image/NAME  an image of that pair, by a random name
    POST /vote        {"pair": TOKEN, "choice": "left" | "right" | "tie"}; answers with the next state
    POST /undo        {}; likewise

Requests from other web pages are refused: the host must be this machine's, and a body must be JSON, which a browser
does not send to another origin without permission.
"""

from __future__ import annotations

import json
import secrets
import sys
from functools import cache
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, get_args
from urllib.parse import urlsplit

from fewstep.data.preferences import Choice
from fewstep.errors import UserError
from fewstep.machine import reason
from fewstep.preferences.session import VotingSession
from fewstep.progress import log_line

ADDRESS = "127.0.0.1"
_LOCAL = {"127.0.0.1", "localhost", "::1"}
_MAX_BODY = 4096  # bytes


class VotingServer(ThreadingHTTPServer):
    """Serves one session. ``url`` is its address.

    Args:
        port: 0 takes a free one.

    Raises:
        UserError: the port is in use.
    """

    daemon_threads = True

    def __init__(self, port: int) -> None:
        try:
            super().__init__((ADDRESS, port), _Handler)
        except (OSError, OverflowError) as error:
            raise UserError(f"--port {port}: {reason(error)}; take another one, or 0 for any free one") from None
        self.session: VotingSession | None = None

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # the browser closed the page
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        return f"http://{ADDRESS}:{self.server_port}/"


@cache
def _page() -> str:
    return (Path(__file__).parent / "page.html").read_text(encoding="utf-8")


class _Handler(BaseHTTPRequestHandler):
    server: VotingServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "fewstep", ""
    timeout = 600  # seconds, of a connection without requests

    def do_GET(self) -> None:
        if not self._is_local():
            return
        session = self._session()
        if self.path == "/":
            self._send_page()
        elif self.path == "/state":
            self._send_json(session.state())
        elif self.path.startswith("/image/"):
            self._send_image(session.image(self.path.removeprefix("/image/")))
        else:
            self._send_problem(HTTPStatus.NOT_FOUND, "no such page")

    def do_POST(self) -> None:
        if not self._is_local():
            return
        body, session = self._read_json(), self._session()
        if body is None:
            return
        try:
            if self.path == "/undo":
                session.undo()
            elif self.path != "/vote":
                self._send_problem(HTTPStatus.NOT_FOUND, "no such page")
                return
            elif body.get("choice") not in get_args(Choice) or not isinstance(body.get("pair"), str):
                self._send_problem(HTTPStatus.BAD_REQUEST, "a vote needs a pair, and the choice left, right or tie")
                return
            elif not session.vote(body["pair"], body["choice"]):
                self._send_json(session.state(), HTTPStatus.CONFLICT)  # another window voted on this pair
                return
        except UserError as error:
            log_line(f"error: {error}")
            self._send_problem(HTTPStatus.INTERNAL_SERVER_ERROR, str(error))
            return
        self._send_json(session.state())

    def log_message(self, format: str, *values: Any) -> None:
        """Requests are not logged."""

    def _session(self) -> VotingSession:
        assert self.server.session is not None
        return self.server.session

    def _is_local(self) -> bool:
        """Whether the request is for this machine's own name, and not from a page of another site."""
        origin, host = self.headers.get("Origin"), self.headers.get("Host", "")
        try:
            named = [urlsplit(f"//{host}").hostname, *([] if origin is None else [urlsplit(origin).hostname])]
        except ValueError:
            named = []
        if named and all(name in _LOCAL for name in named):
            return True
        self.close_connection = True  # a body is not read
        self._send_problem(HTTPStatus.FORBIDDEN, "only from this machine")
        return False

    def _read_json(self) -> dict[str, Any] | None:
        length = self.headers.get("Content-Length", "")
        if self.headers.get_content_type() != "application/json" or not length.isdecimal() or int(length) > _MAX_BODY:
            self.close_connection = True  # its body is not read
            self._send_problem(HTTPStatus.BAD_REQUEST, "expected a short body in JSON")
            return None
        try:
            body = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            body = None
        if not isinstance(body, dict):
            self._send_problem(HTTPStatus.BAD_REQUEST, "expected an object in JSON")
            return None
        return body

    def _send_page(self) -> None:
        nonce = secrets.token_urlsafe(12)
        rules = f"default-src 'none'; img-src 'self'; connect-src 'self'; style-src 'nonce-{nonce}'; "
        rules += f"script-src 'nonce-{nonce}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        page = _page().replace("NONCE", nonce).encode()
        self._send(HTTPStatus.OK, "text/html; charset=utf-8", page, {"Content-Security-Policy": rules})

    def _send_image(self, file: Path | None) -> None:
        if file is None:
            self._send_problem(HTTPStatus.NOT_FOUND, "no such image")
            return
        try:
            content = file.read_bytes()
        except OSError as error:
            log_line(f"error: {file}: cannot be read ({reason(error)})")  # not to the page: the path names the model
            self._send_problem(HTTPStatus.INTERNAL_SERVER_ERROR, "the image cannot be read; see the terminal")
            return
        self._send(HTTPStatus.OK, "image/png", content)

    def _send_problem(self, status: HTTPStatus, message: str) -> None:
        self._send_json({"error": message}, status)

    def _send_json(self, tree: dict[str, Any], status: HTTPStatus = HTTPStatus.OK) -> None:
        self._send(status, "application/json", json.dumps(tree).encode())

    def _send(self, status: HTTPStatus, kind: str, content: bytes, headers: dict[str, str] | None = None) -> None:
        common = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
        self.send_response(status)
        sizes = {"Content-Type": kind, "Content-Length": str(len(content))}
        closing = {"Connection": "close"} if self.close_connection else {}
        for name, value in {**sizes, **common, **closing, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)
