"""Ctrl-C and SIGTERM, held back while processes are started."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

HELD = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Delay signals; processes that are started meanwhile do not get them before they allow it."""
    if not hasattr(signal, 'pthread_sigmask'):  # not a POSIX system
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, HELD)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_resource_tracker() -> None:
    """Start what multiprocessing would start while signals are held, which would let them through again."""
    if hasattr(signal, 'pthread_sigmask'):
        from multiprocessing import resource_tracker

        resource_tracker.ensure_running()


def allow_signals() -> None:
    """Get signals from here on, in a process that was started while they were held."""
    if hasattr(signal, 'pthread_sigmask'):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD)
