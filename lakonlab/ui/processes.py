"""Runs commands side by side, shows their output line by line, and stops them together."""

from __future__ import annotations

import contextlib
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Job:
    """A command.

    Args:
        name: Unique; precedes every line of its output.
        command: Program and arguments.
        after: Names of jobs that must have succeeded before it starts.
    """

    name: str
    command: tuple[str, ...]
    after: tuple[str, ...] = ()


class JobFailedError(RuntimeError):
    """A command ended with an error."""


class InterruptedJobsError(RuntimeError):
    """The commands were stopped by a signal.

    Args:
        signum: The signal.
    """

    def __init__(self, signum: int):
        super().__init__(f'stopped by {signal.Signals(signum).name}')
        self.signum = signum


class JobRunner:
    """Runs jobs in their order, several at a time.

    Ctrl-C and SIGTERM are passed on as a request to stop, once; a second one kills. On Linux the jobs are also asked to
    stop when this process dies.

    Args:
        jobs: The jobs; each comes after those it waits for.
        max_parallel: Jobs that run at the same time.
        env: Environment of the jobs.
        write: Called with every line of output.
        on_end: Called with each job that ends, whether it succeeded, and its seconds.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        max_parallel: int,
        env: Mapping[str, str],
        write: Callable[[str], None],
        on_end: Callable[[Job, bool, float], None],
    ):
        self.waiting = list(jobs)
        self.max_parallel = max_parallel
        self.env = dict(env)
        self.write = write
        self.on_end = on_end
        self.width = max((len(job.name) for job in jobs), default=0)
        self._lines: queue.Queue[tuple[str, str | None]] = queue.Queue()
        self._running: dict[str, tuple[Job, subprocess.Popen, float]] = {}
        self._tails: dict[str, deque[str]] = {}
        self._done: set[str] = set()
        self._signals: list[int] = []

    def run(self) -> None:
        """Run all jobs.

        Raises:
            JobFailedError: A job failed; those that ran beside it were asked to stop.
            InterruptedJobsError: A signal came; all jobs have ended.
        """
        with self._signals_caught():
            failure = None
            while self._running or (self.waiting and failure is None and not self._signals):
                if failure is None and not self._signals:
                    self._start_ready()
                try:
                    name, line = self._lines.get(timeout=0.5)
                except queue.Empty:
                    continue
                if line is not None:
                    self._tails[name].append(line)
                    self.write(f'{name:<{self.width}} | {line}')
                    continue
                job, process, start = self._running.pop(name)
                succeeded = process.wait() == 0
                self.on_end(job, succeeded, time.monotonic() - start)
                if succeeded:
                    self._done.add(name)
                elif failure is None and not self._signals:
                    failure = self._describe_failure(job, process.returncode)
                    self._stop_all()
        if self._signals:
            raise InterruptedJobsError(self._signals[0])
        if failure is not None:
            raise JobFailedError(failure)

    def _start_ready(self) -> None:
        for job in list(self.waiting):
            if len(self._running) >= self.max_parallel:
                return
            if self._done.issuperset(job.after):
                self.waiting.remove(job)
                self._start(job)

    def _start(self, job: Job) -> None:
        # a session of its own keeps the terminal's Ctrl-C from reaching the job a second time
        process = subprocess.Popen(
            job.command,
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_stop_with_parent if sys.platform == 'linux' else None,
        )
        self._running[job.name] = (job, process, time.monotonic())
        self._tails[job.name] = deque(maxlen=20)
        threading.Thread(target=self._read, args=(job.name, process), daemon=True).start()

    def _read(self, name: str, process: subprocess.Popen) -> None:
        for line in process.stdout:
            self._lines.put((name, line.decode('utf-8', 'replace').rstrip()))
        self._lines.put((name, None))

    def _describe_failure(self, job: Job, code: int) -> str:
        last = '\n'.join(f'    {line}' for line in self._tails[job.name])
        return f'{job.name} failed with exit code {code}: {" ".join(job.command)}\nIts last lines:\n{last}'

    def _stop_all(self) -> None:
        for _, process, _ in self._running.values():
            with contextlib.suppress(ProcessLookupError):
                process.terminate()

    @contextlib.contextmanager
    def _signals_caught(self):
        def stop(signum, frame):
            self._signals.append(signum)
            if len(self._signals) == 1:
                self.write(f'{signal.Signals(signum).name}: asking the jobs to save and stop; once more kills them')
                self._stop_all()
            else:
                for _, process, _ in list(self._running.values()):
                    process.kill()

        previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def _stop_with_parent() -> None:
    """Ask the kernel for SIGTERM when the parent dies (prctl PR_SET_PDEATHSIG), even if it is killed."""
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
