"""The exception for mistakes of the user."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in the user's input: one line that names the file, key or value, and what to do about it.

    The command line prints it without a traceback and exits with status 1.
    """


class StopTraining(UserError):
    """What a training depends on fails: the trainer writes a checkpoint of the last finished step, then stops.

    All processes that train together raise it in the same step.
    """
