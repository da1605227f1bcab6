"""The log of requests, in JSON."""

from __future__ import annotations

import logging
import sys


def log_to_stderr() -> None:
    """One line for each record, as the records of this server are: JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter('{"time": "%(asctime)s", "level": "%(levelname)s", "record": %(message)s}'))
    logger = logging.getLogger("fewstep.serve")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)
