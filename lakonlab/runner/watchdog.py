"""Ends a run that hangs, and says where.

When the processes of a run no longer agree on what to do next, or one of them is stuck, all of them wait in a
collective for ever. A watchdog in each process sees that no phase ends any more (:mod:`lakonlab.phases`), writes down
what every thread of every process is doing, and ends the processes, so that the run can be started again.

Watchdogs talk through a key-value store, from threads of their own: a collective would hang as well.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from lakonlab.parallel.store import CONNECTION_LIMIT, serve_store
from lakonlab.phases import PhaseClock
from lakonlab.ranks import Ranks

logger = logging.getLogger(__name__)

HUNG_EXIT_CODE = 124
"""Exit status of a process that its watchdog ended; what the command ``timeout`` reports too."""


def open_store(ranks: Ranks) -> dist.Store | None:
    """A store for the watchdogs alone, in the main process; to be called by all processes together.

    Args:
        ranks: The processes.

    Returns:
        The store, to be kept as long as the process lives; None for one process.

    Raises:
        RuntimeError: A process cannot reach the main one, in all of them.
    """
    if ranks.world_size == 1:
        return None
    own, (host, port) = serve_store(ranks)

    def connect() -> dist.Store:
        return own or dist.TCPStore(host, port, is_master=False, timeout=CONNECTION_LIMIT)

    return ranks.together(connect)


class Watchdog:
    """Watches the phases of a run while it is open, in threads of its own.

    The limit is for one phase of one process without a beat, and for all processes together: while any of them beats,
    the others are waiting for it and do not hang. A phase that may take longer than the limit, such as an evaluation
    or the upload of a checkpoint, has to call :func:`lakonlab.phases.beat` now and then, for example after each batch.
    Time in which the whole process was suspended does not count.

    A process over the limit asks all others for their stacks, gives them a bounded time to answer, and ends with
    :data:`HUNG_EXIT_CODE`; so do the others. What cannot be seen is a thread that keeps Python's interpreter lock; its
    process does not answer, and the others say so.

    Args:
        ranks: The processes.
        clock: The clock of the training thread.
        limit_seconds: Longest time without a beat; 0 for no watchdog.
        folder: Where ``stacks_rank<N>.txt`` is written, a directory of the run.
        iteration: Gives the iteration in progress, from 1.
        store: Shared by all processes, see :func:`open_store`; None if each watches itself alone.
        answer_seconds: How long to wait for the stacks of other processes.
        poll_seconds: Time between two looks at the clock and at the store.

    Raises:
        ValueError: The limit is negative.
    """

    def __init__(
        self,
        ranks: Ranks,
        clock: PhaseClock,
        limit_seconds: float,
        folder: str | Path,
        *,
        iteration: Callable[[], int],
        store: dist.Store | None = None,
        answer_seconds: float = 20.0,
        poll_seconds: float = 1.0,
    ):
        if limit_seconds < 0:
            raise ValueError(
                f'runner.watchdog_seconds={limit_seconds}: expected the seconds that a phase may take without '
                'progress, or 0 for no watchdog'
            )
        self.ranks, self.clock, self.limit_seconds, self.iteration = ranks, clock, limit_seconds, iteration
        self.file = Path(folder) / f'stacks_rank{ranks.rank}.txt'
        self.store = store
        self.answer_seconds, self.poll_seconds = answer_seconds, poll_seconds
        self._threads: list[threading.Thread] = []
        self._closed = threading.Event()
        self._shared_beats = 0
        self._ending = False
        self._alarm: str | None = None
        self._report: str | None = None
        self._answers: dict[int, str] = {}
        self._answered = threading.Event()

    def __enter__(self) -> Watchdog:
        if self.limit_seconds > 0:
            # Two threads: a store whose host has died may keep a caller waiting, and this is when a run hangs.
            targets = [self._watch] if self.store is None else [self._watch, self._talk]
            self._threads = [threading.Thread(target=target, name='watchdog', daemon=True) for target in targets]
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self._closed.set()
        for thread in self._threads:
            thread.join(2 * self.poll_seconds)
        if self._ending:
            # Once other processes leave, what hung here fails; the report is worth more than that error.
            self._threads[0].join()

    def _watch(self) -> None:
        """Count the seconds without a beat of any process."""
        seen, quiet, before = None, 0.0, time.monotonic()
        while not self._closed.wait(self.poll_seconds):
            now = time.monotonic()
            quiet += min(now - before, 2 * self.poll_seconds)  # longer only if the process was suspended
            before = now
            beats = self.clock.beats, self._shared_beats
            if beats != seen:
                seen, quiet = beats, 0.0
            if self._alarm is not None or quiet > self.limit_seconds:
                self._end(self._alarm)
                return

    def _talk(self) -> None:
        """Share beats, listen for an alarm, and after one exchange what every process was doing."""
        beats = self.clock.beats
        try:
            while not self._closed.wait(self.poll_seconds) and self._report is None:
                before, beats = beats, self.clock.beats
                self._shared_beats = self.store.add('beats', int(beats != before))
                if self._alarm is None and self.store.check(['alarm']):
                    self._alarm = self.store.get('alarm').decode()
            if self._report is not None:
                self._exchange()
        except (RuntimeError, OSError) as error:  # the main process, which has the store, may have left already
            logger.debug('watchdog of rank %d: the store is gone: %s', self.ranks.rank, error)
        self._answered.set()

    def _exchange(self) -> None:
        self.store.set('alarm', f'rank {self.ranks.rank}')
        self.store.set(f'report {self.ranks.rank}', self._report)
        self._answers[self.ranks.rank] = self._report
        deadline = time.monotonic() + self.answer_seconds
        while len(self._answers) < self.ranks.world_size and time.monotonic() < deadline:
            for rank in set(range(self.ranks.world_size)) - set(self._answers):
                if self.store.check([f'report {rank}']):
                    self._answers[rank] = self.store.get(f'report {rank}').decode()
            time.sleep(self.poll_seconds)

    def _end(self, alarm: str | None) -> None:
        """Write the stacks, wait for those of others, and end the process.

        Args:
            alarm: Which process asked; None if this one found that nothing moves.
        """
        self._ending = True
        # Whatever blocks below (a log on a full disk, a lock that the hung thread holds), the process ends.
        last_resort = threading.Timer(2 * self.answer_seconds, self._leave)
        last_resort.daemon = True
        last_resort.start()
        seconds = time.monotonic() - self.clock.last_beat
        doing = f'{seconds:.0f} s without progress in phase {self.clock.current!r} of iteration {self.iteration()}'
        stacks = self._write_stacks(doing)
        found = f'more than runner.watchdog_seconds={self.limit_seconds:g}' if alarm is None else f'{alarm} hangs'
        logger.error(
            'rank %d of %d: %s (%s); stacks of all threads: %s',
            self.ranks.rank,
            self.ranks.world_size,
            doing,
            found,
            stacks,
        )
        self._report = f'{doing}; {stacks}'
        if self.store is not None:
            self._answered.wait(self.answer_seconds)
            answers = dict(self._answers)
            if not answers:
                logger.error(
                    'rank %d: no other process can be asked; rank 0, which carries the store of the watchdogs, is stuck'
                    ' or has ended',
                    self.ranks.rank,
                )
            elif self.ranks.rank == min(answers):
                missing = f'did not answer within {self.answer_seconds:g} s'
                lines = [f'  rank {rank}: {answers.get(rank, missing)}' for rank in range(self.ranks.world_size)]
                logger.error(
                    'the run hangs. A rank whose phase or iteration differs, or that does not answer, is the one to '
                    'look at first:\n%s',
                    '\n'.join(lines),
                )
        if self.ranks.is_main:
            if self.store is not None:
                time.sleep(3 * self.poll_seconds)  # the store ends with this process; let the others read it
            logger.error('ending the run; the same command resumes it from its newest checkpoint')
        self._leave()

    def _write_stacks(self, doing: str) -> str:
        """Write the stacks of all threads of this process; returns where they are."""
        try:
            with open(self.file, 'w', encoding='utf-8') as file:
                file.write(f'rank {self.ranks.rank} of {self.ranks.world_size}: {doing}\n\n')
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            faulthandler.dump_traceback(all_threads=True)
            return f'standard error, since {self.file} cannot be written ({error})'
        return str(self.file)

    def _leave(self) -> None:
        os._exit(HUNG_EXIT_CODE)
