"""Prompts that cannot be read."""

from bad_inputs.table import Case, Message, Section

LONG = "fox " * 600

SECTION = Section(
    "Prompts",
    "[Prompts](../guides/prompts.md) describes all formats.",
    (
        Message(
            "no prompts: give some, or --prompts-file",
            "Every word after the model is a prompt; quote prompts with spaces.",
            Case("generate tiny", "no prompts"),
        ),
        Message(
            "prompt has {count} tokens, at most {limit} fit: {prompt}",
            "Shorten it.",
            Case(f"generate tiny '{LONG}'", "at most 512 fit"),
            Case(f"generate tiny 'a fox' --guidance-scale 2 --negative-prompt '{LONG}'", "at most 512 fit"),
            Case(f"generate tiny 'a fox' --system-prompt '{LONG}'", "at most 512 fit"),
            Case(f"generate tiny 'a fox' --assistant-prefix '{LONG}'", "at most 512 fit"),
        ),
    ),
)
