"""Lumina 2's prompt template, in place of a chat template."""

from __future__ import annotations

from fewstep.errors import UserError
from fewstep.models.text import PromptEncoder

#: diffusers' ``Lumina2Pipeline.system_prompt``.
SYSTEM_PROMPT = (
    "You are an assistant designed to generate superior images with the superior degree of image-text alignment "
    "based on textual prompts or user prompts."
)


class Lumina2PromptEncoder(PromptEncoder):
    """Prompts follow a system prompt; unset or "", it is :data:`SYSTEM_PROMPT`. The null prompt is "" alone, as in
    diffusers and where captions were dropped in Lumina's training."""

    def template(self, text: str, *, system: str | None = None, assistant_prefix: str = "") -> str:
        if assistant_prefix:
            raise UserError("assistant_prefix: prompts of Lumina2Pipeline have no such part; leave it out")
        if not text:
            return ""
        return f"{(self.system if system is None else system) or SYSTEM_PROMPT} <Prompt Start> {text}"
