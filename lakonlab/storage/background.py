"""One thread that writes while training goes on."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class BackgroundWriter:
    """Runs one job at a time in one thread and hands its failure to whoever asks next.

    The interpreter waits for a running job before it exits.
    """

    def __init__(self):
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix='checkpoint-writer')
        self._job: Future | None = None

    def submit(self, job: Callable[[], object]) -> None:
        """Start a job after the previous one has ended.

        Raises:
            Exception: What the previous job raised, if nobody was told so far.
        """
        self.wait()
        self._job = self._executor.submit(job)

    @property
    def is_idle(self) -> bool:
        """Whether no job is running; costs nothing."""
        return self._job is None or self._job.done()

    def check(self) -> None:
        """Raise what the last job raised, if it has ended with a failure; costs nothing otherwise."""
        if self._job is not None and self._job.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the running job.

        Raises:
            Exception: What the job raised; reported once.
        """
        job, self._job = self._job, None
        if job is not None:
            job.result()

    def close(self) -> None:
        """Wait for the running job and end the thread; reports failures like :meth:`wait`."""
        self._executor.shutdown(wait=True)
        self.wait()
