"""Options with an empty value, as in ``--out "$FOLDER"`` where the shell knows no FOLDER."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

#: Text of a prompt, where none is a choice.
MAY_BE_EMPTY = {"--negative-prompt", "--system-prompt", "--assistant-prefix"}


def empty_option(command: Any, words: Sequence[str]) -> str | None:
    """The first option in a command line that has an empty value.

    An empty path would be the working directory.

    Args:
        command: the program or group; its subcommands are found by the first words.
    """
    while words and words[0] in getattr(command, "commands", {}):
        command, words = command.commands[words[0]], words[1:]
    options = {
        name
        for parameter in command.params
        if parameter.param_type_name == "option" and not parameter.is_flag
        for name in parameter.opts
    } - MAY_BE_EMPTY
    given = [*pairwise(words), *(word.split("=", 1) for word in words if word.startswith("--") and "=" in word)]
    return next((name for name, value in given if name in options and not value.strip()), None)
