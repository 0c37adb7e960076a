"""Ctrl-C and SIGTERM: finish the iteration, save, leave."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType


def ignore_termination() -> None:
    """From here on SIGTERM changes nothing: the process is leaving, and its launcher would end it meanwhile."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


class StopRequest:
    """Remembers a request to stop while it is active; a second one ends the process at once.

    Signals reach only the main thread of a process; elsewhere this does nothing. Processes forked meanwhile, such as
    workers that load data, leave Ctrl-C to their parent and end on SIGTERM.
    """

    def __init__(self):
        self.signal: signal.Signals | None = None
        self._previous: dict[signal.Signals, object] = {}
        self._process = os.getpid()

    @property
    def exit_code(self) -> int:
        """What a shell reports for a process ended by the signal: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + self.signal if self.signal else 0

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = signal.Signals(number)
        message = f'\n{self.signal.name}: stopping after this iteration and saving; once more quits at once\n'
        os.write(2, message.encode())  # a signal may interrupt the logger, which must not be entered twice

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
