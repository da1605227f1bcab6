"""The reward "judge": a vision-language model behind an endpoint in OpenAI's chat format, which grades by a rubric."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fewstep.atomic import write_text
from fewstep.data.images import to_uint8
from fewstep.errors import UserError
from fewstep.rewards.protocol import RewardInfo

#: The environment variable of the API key; where there is none, no key is sent.
KEY = "FEWSTEP_JUDGE_API_KEY"
RUBRIC = (
    "You grade images made from a prompt. Give 0 for an image that shows nothing of the prompt, 10 for a sharp image "
    "without defects that shows all of it. Count wrong objects, wrong colors, missing parts, distortions and "
    "unreadable lettering. Reply with the number alone."
)
LARGEST = 10.0  # of the rubric's grades
RETRIED = {408, 409, 429, 500, 502, 503, 504}
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


class EndpointReward:
    """The grade that a vision-language model gives, from 0 to 10, divided by 10.

    Every answer is kept in the cache folder, by model, rubric, prompt and image: a run that is repeated asks nothing
    twice. A request that fails for a passing reason is repeated after pauses of 1, 2, 4, ... seconds.

    Args:
        endpoint: "URL#MODEL", such as "http://localhost:8000/v1#Qwen/Qwen3-VL-8B-Instruct"; the API key, where the
            server needs one, is read from FEWSTEP_JUDGE_API_KEY.
        rubric: what the model is told to do; it must end in one number from 0 to 10.
        cache: folder of the answers.
        timeout: seconds that one request may take.
        attempts: requests for one image, at most.
        parallel: requests at a time.
        pause: seconds before the first repetition.

    Raises:
        UserError: the endpoint is not of this form, or the cache cannot be written.
    """

    name = "judge"
    info = RewardInfo(differentiable=False, range=(0.0, 1.0), license="that of the endpoint's model")

    def __init__(
        self,
        endpoint: str,
        *,
        rubric: str = RUBRIC,
        cache: str | Path = Path("~/.cache/fewstep/judge"),
        timeout: float = 60.0,
        attempts: int = 5,
        parallel: int = 4,
        pause: float = FIRST_PAUSE,
    ) -> None:
        self.url, hash_sign, self.model = endpoint.rpartition("#")
        if not hash_sign or not self.model or not self.url.startswith(("http://", "https://")):
            raise UserError(f"reward judge:{endpoint}: give URL#MODEL, as in judge:http://localhost:8000/v1#MODEL")
        self.rubric, self.cache = rubric, Path(cache).expanduser()
        self.timeout, self.attempts, self.parallel, self.pause = timeout, attempts, parallel, pause

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores float32 [B], NaN where the endpoint gave none.

        Args:
            images: [B, 3, H, W] in [0, 1].

        Raises:
            UserError: the endpoint refuses all requests, as with a wrong key or model.
        """
        pixels = to_uint8(images.detach().float()).numpy()
        with ThreadPoolExecutor(self.parallel) as pool:
            scores = list(pool.map(self._score, [_png(image) for image in pixels], prompts))
        return torch.tensor(scores, dtype=torch.float32, device=images.device)

    def _score(self, png: bytes, prompt: str) -> float:
        key = hashlib.sha256(json.dumps([self.model, self.rubric, prompt]).encode() + png).hexdigest()
        file = self.cache / key[:2] / f"{key}.json"
        if file.is_file():
            try:
                return float(json.loads(file.read_text(encoding="utf-8"))["score"])
            except (ValueError, KeyError, TypeError):
                pass  # damaged: it is written anew
        answer = self._ask(png, prompt)
        score = parse_grade(answer)
        if score is None:
            return float("nan")
        write_text(file, json.dumps({"model": self.model, "prompt": prompt, "answer": answer, "score": score}))
        return score

    def _ask(self, png: bytes, prompt: str) -> str:
        """The model's answer, or "" where none came in ``attempts`` requests. Raises: UserError as above."""
        picture = {"url": f"data:image/png;base64,{base64.b64encode(png).decode()}"}
        content = [{"type": "text", "text": f"Prompt: {prompt}"}, {"type": "image_url", "image_url": picture}]
        messages = [{"role": "system", "content": self.rubric}, {"role": "user", "content": content}]
        body = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": 64}
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(
            f"{self.url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers, method="POST"
        )
        for attempt in range(self.attempts):
            pause = min(LONGEST_PAUSE, self.pause * 2**attempt)
            try:
                # the scheme was checked to be http or https
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    return _answer(json.load(response))
            except urllib.error.HTTPError as error:
                if error.code not in RETRIED:
                    raise UserError(f"{self.url}: the request for {self.model} was refused: {_why(error)}") from None
                pause = max(pause, min(LONGEST_PAUSE, _retry_after(error)))
            except (OSError, ValueError, KeyError, IndexError, TypeError):
                pass  # no connection, a time-out, or no answer in OpenAI's format
            if attempt + 1 < self.attempts:
                time.sleep(pause)
        return ""


def parse_grade(answer: str) -> float | None:
    """The last number of an answer, from 0 to 10, divided by 10; None if there is no such number."""
    found = _NUMBER.findall(answer)
    grade = float(found[-1]) if found else -1.0
    if answer.rstrip(" .").endswith("/10") and len(found) > 1:  # "7/10"
        grade = float(found[-2])
    return grade / LARGEST if 0 <= grade <= LARGEST else None


def _answer(reply: Any) -> str:
    return str(reply["choices"][0]["message"]["content"])


def _png(image: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "png")
    return buffer.getvalue()


def _why(error: urllib.error.HTTPError) -> str:
    """The server's own reason in one line; it never holds the key, which is sent in a header only."""
    text = " ".join(error.read(2000).decode("utf-8", "replace").split())[:160]
    return f"{error.code} {error.reason}{text and f', {text}'}"


def _retry_after(error: urllib.error.HTTPError) -> float:
    """Seconds of the header Retry-After, 0 without one."""
    value = error.headers.get("Retry-After", "")
    return float(value) if value.isdigit() else 0.0
