"""The one exception a person is meant to read."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in what the user gave: one line that names the file, key or value, and what to do about it.

    The command line prints it without a traceback and exits with status 1.
    """
