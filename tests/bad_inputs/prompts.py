"""Prompts that cannot be read."""

from bad_inputs.files import DISTILL, PROMPTS
from bad_inputs.table import Case, Message, Section

SECTION = Section(
    "Prompts",
    "[Prompts](../guides/prompts.md) describes all formats.",
    (
        Message(
            "no prompts: give some, or --prompts-file",
            "",
            Case("generate tiny", "no prompts"),
        ),
        Message(
            "prompt has {count} tokens, at most {limit} fit: {prompt}",
            "Shorten it.",
            Case(f"generate tiny '{'fox ' * 600}'", "at most 512 fit"),
        ),
    ),
)
