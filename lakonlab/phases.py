"""What a training step is doing, and for how long.

``with phase('teacher'):`` marks a stretch of a step. It does nothing until a :class:`PhaseClock` is active, as it is
while a run trains; then the log says what share of the time each phase took, and a watchdog can say where a run hangs.
Phases are marked around networks, never inside of them.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar

import torch
from torch.autograd import profiler

PHASES = ('data', 'teacher', 'student', 'rollout', 'optimiser', 'checkpoint', 'evaluation')
"""The phases of a run; ``student`` is the forward and backward pass without what is marked inside of it."""

SAMPLING_PHASES = ('network', 'policy')
"""The phases of making samples; ``policy`` is the loop without the network: policies, solver."""

OTHER = 'other'
"""Name of the time outside of every phase."""

Item = TypeVar('Item')


class Timeline(Protocol):
    """Where a clock's marks are made: on the host, or among the work of a device."""

    def mark(self) -> Any:
        """A mark of this moment."""

    def passed(self, mark: Any) -> bool:
        """Whether the mark has a time by now."""

    def wait(self, mark: Any) -> None:
        """Wait until it has."""

    def seconds(self, start: Any, end: Any) -> float:
        """Time between two marks that have one."""


class HostTimeline:
    """Marks that are times of the host."""

    def mark(self) -> float:
        """See :class:`Timeline`, as for the methods below."""
        return time.perf_counter()

    def passed(self, mark: float) -> bool:
        return True

    def wait(self, mark: float) -> None:
        pass

    def seconds(self, start: float, end: float) -> float:
        return end - start


class StreamTimeline:
    """Marks that are CUDA events on the current stream: the device notes the time when it gets there, nobody waits.

    Args:
        device: A CUDA device.
    """

    def __init__(self, device: torch.device):
        self.device = device

    def mark(self) -> torch.cuda.Event:
        """See :class:`Timeline`, as for the methods below."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def passed(self, mark: torch.cuda.Event) -> bool:
        return mark.query()

    def wait(self, mark: torch.cuda.Event) -> None:
        mark.synchronize()

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        start.synchronize()  # has passed already, unless the current stream was another one then
        return max(0.0, start.elapsed_time(end) / 1000)


class PhaseClock:
    """Time by phase, each moment credited to the innermost phase alone.

    Args:
        device: Where the work is done. On CUDA, time is that of the device's stream, so a phase in which the host runs
            ahead is not charged for the work that is still queued before it.
        timeline: Where marks are made; None for the device's own.
    """

    current: str
    """The innermost phase; may be read from any thread."""
    beats: int
    """Counts changes of phase and calls of :meth:`beat`; may be read from any thread."""
    last_beat: float
    """When it was counted up, in seconds of ``time.monotonic``."""

    def __init__(self, device: torch.device, timeline: Timeline | None = None):
        if timeline is None:
            timeline = StreamTimeline(device) if device.type == 'cuda' else HostTimeline()
        self._timeline = timeline
        self._seconds: dict[str, float] = {}
        self._pending: deque[tuple[str, Any]] = deque()
        self.current, self.beats, self.last_beat = OTHER, 0, time.monotonic()
        self._start = timeline.mark()

    @contextlib.contextmanager
    def active(self) -> Iterator[PhaseClock]:
        """Make :func:`phase` report to this clock, in this thread, and begin a window."""
        token = _ACTIVE.set(self)
        try:
            self.restart()
            yield self
        finally:
            _ACTIVE.reset(token)

    def beat(self) -> None:
        """Say that there is progress within a phase."""
        self.beats += 1
        self.last_beat = time.monotonic()

    def switch(self, name: str) -> None:
        """End what is going on and begin ``name``; :func:`phase` calls it at both of its ends."""
        self._pending.append((self.current, self._timeline.mark()))
        self.current = name
        self.beat()
        self._settle(wait=False)

    def restart(self) -> None:
        """Begin a new window."""
        self._pending.clear()
        self._seconds = dict.fromkeys(self._seconds, 0.0)
        self._start = self._timeline.mark()

    def seconds(self) -> dict[str, float]:
        """Seconds of each phase since the window began; waits until the device has come here.

        Returns:
            Every phase since the clock was made, 0 if it did not occur in the window, and ``'other'``.
        """
        self._pending.append((self.current, self._timeline.mark()))
        self._settle(wait=True)
        return {OTHER: 0.0, **self._seconds}

    def shares(self) -> dict[str, float]:
        """The same as fractions in [0, 1], which sum to 1."""
        seconds = self.seconds()
        total = sum(seconds.values())
        if total <= 0:
            return {**seconds, OTHER: 1.0}
        return {name: value / total for name, value in seconds.items()}

    def _settle(self, wait: bool) -> None:
        """Credit the stretches that have ended; without waiting, those of which the device says so by itself."""
        while self._pending:
            name, end = self._pending[0]
            if wait:
                self._timeline.wait(end)
            elif not self._timeline.passed(end):
                return
            self._pending.popleft()
            self._seconds[name] = self._seconds.get(name, 0.0) + self._timeline.seconds(self._start, end)
            self._start = end


_ACTIVE: ContextVar[PhaseClock | None] = ContextVar('active phase clock', default=None)
_NOTHING = contextlib.nullcontext()


class _Phase:
    """A stretch of one phase, reported to a clock and to a profiler, where there are such."""

    __slots__ = ('_clock', '_name', '_outer', '_record')

    def __init__(self, clock: PhaseClock | None, name: str):
        self._clock, self._name, self._record = clock, name, None

    def __enter__(self) -> None:
        if profiler._is_profiler_enabled:
            self._record = profiler.record_function(f'phase: {self._name}')
            self._record.__enter__()
        if self._clock is not None:
            self._outer = self._clock.current
            self._clock.switch(self._name)

    def __exit__(self, *exception) -> None:
        if self._clock is not None:
            self._clock.switch(self._outer)
        if self._record is not None:
            self._record.__exit__(*exception)


def phase(name: str) -> contextlib.AbstractContextManager[None]:
    """Mark what is done while it is open; phases may contain each other.

    Nothing is marked in what ``torch.compile`` traces.

    Args:
        name: One of :data:`PHASES`, or any other name.
    """
    if torch.compiler.is_compiling():
        return contextlib.nullcontext()
    clock = _ACTIVE.get()
    if clock is None and not profiler._is_profiler_enabled:
        return _NOTHING
    return _Phase(clock, name)


def in_phase(name: str, items: Iterable[Item]) -> Iterator[Item]:
    """The items, with the time until each of them arrives marked as a phase.

    Args:
        name: See :func:`phase`.
        items: What is iterated over.
    """
    iterator = iter(items)
    while True:
        with phase(name):
            try:
                item = next(iterator)
            except StopIteration:
                return
        yield item


def active_clock() -> PhaseClock | None:
    """The clock of the run that this thread trains, if there is one."""
    return _ACTIVE.get()


def beat() -> None:
    """Say that there is progress, in a loop that spends long in one phase."""
    clock = _ACTIVE.get()
    if clock is not None:
        clock.beat()
