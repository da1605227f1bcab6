"""Prompts revised by a language model before images are made from them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from fewstep.errors import UserError
from fewstep.models.answer_cache import AnswerCache
from fewstep.models.chat_endpoint import ChatEndpoint
from fewstep.models.components import load_component
from fewstep.models.family import resolve_family
from fewstep.models.generation_config import load_generation_config
from fewstep.models.language_model import open_language_model

OWN = "own"  # names the image model's text encoder as the language model

#: The environment variable of an endpoint's API key; where there is none, no key is sent.
KEY = "FEWSTEP_ENHANCER_API_KEY"
MAX_TOKENS = 2048  # of an answer, its reasoning included
SECONDS = 120.0

#: What the language model is told. Its reasoning comes first, and is thrown away.
TEMPLATE = """\
You revise prompts for a model that makes images from text.

First think about the picture that the user has in mind: the subject and what it does, the place, the light, the \
colors, the style, the composition, and any lettering. Settle what the prompt leaves open, and change nothing that it \
settles. Then describe the finished picture in one paragraph.

Rules:
- Write in the language of the user's prompt.
- Keep every object, number, color, name and style that the user wants.
- Copy text in quotation marks letter by letter, in its own language, in quotation marks.
- Describe only what can be seen. No lists, no headings, no praise such as "masterpiece".
- At most 150 words.

End your answer with the revised prompt between <prompt> and </prompt>, and write nothing after it."""

_ANSWER = re.compile(r"<prompt>((?:(?!<prompt>).)*?)</prompt>", re.DOTALL)
_QUOTED = re.compile(r'"([^"]+)"|“([^”]+)”|「([^」]+)」|『([^』]+)』|«([^»]+)»|„([^“”]+)[“”]')


class Answers(Protocol):
    """A language model. ``identity`` recognizes it."""

    identity: str

    def answer(self, system: str, text: str, max_tokens: int, seconds: float) -> str: ...


class Endpoint:
    """A language model behind an endpoint "URL#MODEL" in OpenAI's chat format. Raises: UserError for another form."""

    def __init__(self, endpoint: str) -> None:
        self.identity, self.model = endpoint, ChatEndpoint(endpoint, "--enhancer ", KEY, attempts=1)

    def answer(self, system: str, text: str, max_tokens: int, seconds: float) -> str:
        """One request, without repetition. Raises: UserError if it is refused or not answered in time."""
        self.model.timeout = seconds
        answer = self.model([{"role": "system", "content": system}, {"role": "user", "content": text}], max_tokens)
        if not answer:
            raise UserError(f"no answer within {seconds:g} s")
        return answer


@dataclass(frozen=True)
class Revision:
    """Attributes:
    prompt: the revised one, or the original one.
    problem: why it is the original one; None if it is not.
    """

    prompt: str
    problem: str | None = None


class Enhancer:
    """Revises prompts. Answers that can be used are kept on disk, by model, template and prompt.

    Args:
        model: writes the answers.
        seconds: for one prompt.
        cache: folder of the answers.
        check: raises UserError for a prompt that the image model cannot take.
    """

    def __init__(
        self,
        model: Answers,
        *,
        seconds: float = SECONDS,
        cache: str | Path = "~/.cache/fewstep/enhancer",
        check: Callable[[str], object] = lambda prompt: None,
    ) -> None:
        self.model, self.seconds, self.cache, self.check = model, seconds, AnswerCache(cache), check

    def __call__(self, prompt: str) -> Revision:
        """The revised prompt; the original one wherever anything goes wrong, with the reason."""
        key = hashlib.sha256(json.dumps([self.model.identity, TEMPLATE, prompt]).encode()).hexdigest()
        kept = self.cache.read(key, "revised")
        try:
            if isinstance(kept, str):
                return Revision(self._checked(prompt, kept))
            revised = self._checked(prompt, parse_answer(self._answer(prompt)))
            self.cache.write(key, {"model": self.model.identity, "prompt": prompt, "revised": revised})
            return Revision(revised)
        except UserError as error:
            return Revision(prompt, str(error))

    def _answer(self, prompt: str) -> str:
        try:
            return self.model.answer(TEMPLATE, prompt, MAX_TOKENS, self.seconds)
        except UserError:
            raise
        except Exception as error:  # whatever fails, such as the memory, the image is made
            raise UserError(f"the language model failed ({type(error).__name__})") from None

    def _checked(self, prompt: str, revised: str) -> str:
        """Raises: UserError for a revised prompt that lost quoted text, or that the image model cannot take."""
        for text in quoted(prompt):
            if text not in revised:
                raise UserError(f"the revised prompt lost the quoted text {text!r}")
        self.check(revised)
        return revised


def parse_answer(answer: str) -> str:
    """The prompt in an answer, in one line. Raises: UserError if there is none."""
    found = _ANSWER.findall(answer.rpartition("</think>")[2])
    revised = " ".join(found[-1].split()) if found else ""
    if not revised:
        raise UserError("the answer has no revised prompt, or was cut off")
    return revised


def quoted(prompt: str) -> list[str]:
    """The texts in quotation marks, without the marks."""
    return [next(filter(None, groups)) for groups in _QUOTED.findall(prompt)]


def open_answers(where: str, device: torch.device) -> Answers:
    """A language model in a folder, or behind an endpoint "URL#MODEL". Raises: UserError."""
    if where.startswith(("http://", "https://")):
        return Endpoint(where)
    return open_language_model(Path(where).expanduser(), device)


def enhancer_for(folder: Path, model: Answers, system: str | None = None) -> Enhancer:
    """An enhancer whose prompts the image model in ``folder`` can take.

    Its tokenizers are its own, since they are not to be used in two threads at once.

    Args:
        system: the system prompt of the images; None is the model's.
    """
    family = resolve_family(folder)
    components = {
        name: load_component(folder, name, family=family) if name in family.others else None
        for name in family.prompt_components
    }
    encoder = family.prompt_encoder(components, load_generation_config(folder).system_prompt)
    return Enhancer(model, check=lambda prompt: encoder.check([prompt], system=system))
