"""A language model behind an endpoint in OpenAI's chat format."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

from fewstep.errors import UserError

RETRIED = {408, 409, 429, 500, 502, 503, 504}
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds


class ChatEndpoint:
    """A model that is reached by HTTP. A request that fails for a passing reason is repeated after pauses of 1, 2, 4,
    ... seconds.

    Args:
        endpoint: "URL#MODEL", such as "http://localhost:8000/v1#Qwen/Qwen3-VL-8B-Instruct".
        user: of the endpoint, before it in messages.
        key: the environment variable of the API key; where there is none, no key is sent.
        timeout: seconds that one request may take.
        attempts: requests for one answer, at most.
        pause: seconds before the first repetition.

    Raises:
        UserError: the endpoint is not of this form.
    """

    def __init__(
        self,
        endpoint: str,
        user: str,
        key: str,
        *,
        timeout: float = 60.0,
        attempts: int = 5,
        pause: float = FIRST_PAUSE,
    ) -> None:
        self.url, hash_sign, self.model = endpoint.rpartition("#")
        if not hash_sign or not self.model or not self.url.startswith(("http://", "https://")):
            raise UserError(f"{user}{endpoint}: give URL#MODEL, as in http://localhost:8000/v1#MODEL")
        self.key, self.timeout, self.attempts, self.pause = key, timeout, attempts, pause

    def __call__(self, messages: Sequence[Mapping[str, Any]], max_tokens: int) -> str:
        """The model's answer, or "" where none came in ``attempts`` requests.

        Raises:
            UserError: the endpoint refuses the request, as with a wrong key or model.
        """
        body = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": max_tokens}
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.key):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(
            f"{self.url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers, method="POST"
        )
        for attempt in range(self.attempts):
            pause = min(LONGEST_PAUSE, self.pause * 2**attempt)
            try:
                # the scheme was checked to be http or https
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    return str(json.load(response)["choices"][0]["message"]["content"])
            except urllib.error.HTTPError as error:
                if error.code not in RETRIED:
                    raise UserError(f"{self.url}: the request for {self.model} was refused: {_why(error)}") from None
                pause = max(pause, min(LONGEST_PAUSE, _retry_after(error)))
            except (OSError, ValueError, KeyError, IndexError, TypeError):
                pass  # no connection, a time-out, or no answer in OpenAI's format
            if attempt + 1 < self.attempts:
                time.sleep(pause)
        return ""


def _why(error: urllib.error.HTTPError) -> str:
    """The server's own reason in one line; it never holds the key, which is sent in a header only."""
    text = " ".join(error.read(2000).decode("utf-8", "replace").split())[:160]
    return f"{error.code} {error.reason}{text and f', {text}'}"


def _retry_after(error: urllib.error.HTTPError) -> float:
    """Seconds of the header Retry-After, 0 without one."""
    value = error.headers.get("Retry-After", "")
    return float(value) if value.isdigit() else 0.0
