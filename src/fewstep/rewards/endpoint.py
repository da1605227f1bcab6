"""The reward "judge": a vision-language model behind an endpoint in OpenAI's chat format, which grades by a rubric."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fewstep.data.images import to_uint8
from fewstep.models.answer_cache import AnswerCache
from fewstep.models.chat_endpoint import FIRST_PAUSE, ChatEndpoint
from fewstep.rewards.protocol import RewardInfo

#: The environment variable of the API key; where there is none, no key is sent.
KEY = "FEWSTEP_JUDGE_API_KEY"
RUBRIC = (
    "You grade images made from a prompt. Give 0 for an image that shows nothing of the prompt, 10 for a sharp image "
    "without defects that shows all of it. Count wrong objects, wrong colors, missing parts, distortions and "
    "unreadable lettering. Reply with the number alone."
)
LARGEST = 10.0  # of the rubric's grades
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
        self.endpoint = ChatEndpoint(endpoint, "reward judge:", KEY, timeout=timeout, attempts=attempts, pause=pause)
        self.rubric, self.cache, self.parallel = rubric, AnswerCache(cache), parallel

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
        model = self.endpoint.model
        key = hashlib.sha256(json.dumps([model, self.rubric, prompt]).encode() + png).hexdigest()
        kept = self.cache.read(key, "score")
        if isinstance(kept, int | float):
            return float(kept)
        picture = {"url": f"data:image/png;base64,{base64.b64encode(png).decode()}"}
        content = [{"type": "text", "text": f"Prompt: {prompt}"}, {"type": "image_url", "image_url": picture}]
        answer = self.endpoint(
            [{"role": "system", "content": self.rubric}, {"role": "user", "content": content}], max_tokens=64
        )
        score = parse_grade(answer)
        if score is None:
            return float("nan")
        self.cache.write(key, {"model": model, "prompt": prompt, "answer": answer, "score": score})
        return score


def parse_grade(answer: str) -> float | None:
    """The last number of an answer, from 0 to 10, divided by 10; None if there is no such number."""
    found = _NUMBER.findall(answer)
    grade = float(found[-1]) if found else -1.0
    if answer.rstrip(" .").endswith("/10") and len(found) > 1:  # "7/10"
        grade = float(found[-2])
    return grade / LARGEST if 0 <= grade <= LARGEST else None


def _png(image: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "png")
    return buffer.getvalue()
