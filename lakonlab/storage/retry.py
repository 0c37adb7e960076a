"""Trying again what may have failed by chance, for a limited time."""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Callable
from typing import TypeVar

from lakonlab.storage.errors import StorageError, TransientError

logger = logging.getLogger(__name__)

SECONDS_VARIABLE = 'LAKONLAB_RETRY_SECONDS'
DEFAULT_SECONDS = 120.0
FIRST_DELAY = 0.5
LARGEST_DELAY = 20.0

Value = TypeVar('Value')


def retry_seconds() -> float:
    """For how long a failing operation is tried again: ``$LAKONLAB_RETRY_SECONDS``, by default two minutes.

    Raises:
        StorageError: The variable holds no number of seconds.
    """
    text = os.environ.get(SECONDS_VARIABLE)
    try:
        seconds = DEFAULT_SECONDS if not text else float(text)
        if not 0 <= seconds < float('inf'):
            raise ValueError
    except ValueError as error:
        raise StorageError(f'{SECONDS_VARIABLE}={text!r}: expected a number of seconds, 0 or more') from error
    return seconds


class Patience:
    """Decides how often an operation is tried again, and waits in between.

    Delays double from half a second up to 20 s, each shortened at random by up to a half, so that many processes do not
    come back together. No attempt starts later than :func:`retry_seconds` after the first failure. Random numbers come
    from the operating system: those of a run are not touched.

    Args:
        what: What is being done, with its path, for the log.
    """

    def __init__(self, what: str):
        self.what = what
        self._random = random.SystemRandom()
        self.progress()

    def progress(self) -> None:
        """Something was achieved: failures so far do not count any more."""
        self.attempts = 0
        self._began: float | None = None

    def wait_after(self, error: TransientError) -> None:
        """Wait until the next attempt.

        Args:
            error: How the last one failed.

        Raises:
            TransientError: The time is up.
        """
        self.attempts += 1
        now = time.monotonic()
        self._began = now if self._began is None else self._began
        delay = min(FIRST_DELAY * 2 ** (self.attempts - 1), LARGEST_DELAY) * self._random.uniform(0.5, 1)
        if now + delay - self._began > retry_seconds():
            raise TransientError(
                f'{error} (gave up {self.what} after {self.attempts} attempts in {now - self._began:.0f} s; '
                f'{SECONDS_VARIABLE} sets for how long it is tried)'
            ) from error
        logger.warning('%s: attempt %d failed, the next in %.1f s: %s', self.what, self.attempts, delay, error)
        time.sleep(delay)


def persistently(function: Callable[[], Value], what: str) -> Value:
    """Call a function until it does not fail by chance.

    Args:
        function: Raises :class:`TransientError` for what is worth another attempt.
        what: What it does, with its path, for the log.

    Raises:
        TransientError: It has failed for :func:`retry_seconds`.
        Exception: Whatever else it raises, at once.
    """
    patience = Patience(what)
    while True:
        try:
            return function()
        except TransientError as error:
            patience.wait_after(error)
