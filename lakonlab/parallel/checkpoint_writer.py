"""A process beside every process of a run, which writes checkpoints while training goes on.

The writers form a process group of their own, so what they agree on never meets the exchange of gradients. Training
hands over a copy of its state in shared memory and goes on; a failure of one of them reaches all processes of the run.
A writer ends with the process it belongs to.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import reduction
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lakonlab.held_signals import signals_held
from lakonlab.parallel.store import serve_store
from lakonlab.parallel.writer_process import READY
from lakonlab.phases import beat
from lakonlab.ranks import ALONE, Ranks
from lakonlab.storage.checkpoint import CheckpointError, write_checkpoint
from lakonlab.storage.pieces import Box, Pieces
from lakonlab.storage.publisher import Record
from lakonlab.storage.remote_path import AnyPath
from lakonlab.storage.shared_memory import SharedMemory, positions

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0
GRACE_SECONDS = 5.0
"""How long a writer may still report, or end, after another one has failed, or when nothing is left to do."""
NOTICE_SECONDS = 60.0
"""How often the log says that training waits for a checkpoint."""
WRITE_SECONDS = 3600.0
"""How long a checkpoint may take until it is given up."""
START_SECONDS = 10.0
"""How long a process that leaves waits for writers that have not found each other yet."""
Parts = Mapping[str, Mapping[str, Pieces]]


class WriterEndedError(CheckpointError):
    """A process that writes checkpoints has ended before its time."""


@dataclass(frozen=True)
class SaveJob:
    """A checkpoint to write.

    Args:
        run_dir: Directory of the run.
        step: Completed iterations.
        state: Everything but tensors, plain data.
        config_text: The resolved config.
        names: Under which names it is published, one after the other; None for that of the step.
        extra: What the main process adds to the unpublished directory, see
            :func:`~lakonlab.storage.checkpoint.write_checkpoint`.
        confirm: What the main process calls just before it publishes, see there.
        afterwards: What the main process calls once the checkpoint is published.
    """

    run_dir: AnyPath
    step: int
    state: Mapping[str, Any]
    config_text: str = ''
    names: tuple[str | None, ...] = (None,)
    extra: Callable[[AnyPath, AnyPath], Mapping[str, Record]] | None = None
    confirm: Callable[[], object] | None = None
    afterwards: Sequence[Callable[[], object]] = field(default=())

    def write(self, parts: Parts, ranks: Ranks) -> AnyPath:
        """Write it; every process of the group calls this.

        Args:
            parts: Part -> name -> what this process holds; not changed by anyone until this returns.
            ranks: The processes.

        Returns:
            Where it was published last.

        Raises:
            CheckpointError: It failed in one of the processes.
        """
        for name in self.names:
            path = write_checkpoint(
                self.run_dir, self.step, parts, self.state, self.config_text, name, ranks, self.extra, self.confirm
            )
        if ranks.is_main:
            for function in self.afterwards:
                function()
        return path


@dataclass(frozen=True)
class Layout:
    """Where in shared memory a tensor's pieces lie."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    boxes: tuple[Box, ...]
    starts: tuple[int, ...]

    def pieces(self, memory: SharedMemory) -> Pieces:
        """The pieces."""
        tensors = (memory.tensor(start, sizes, self.dtype) for start, (_, sizes) in zip(self.starts, self.boxes))
        return Pieces(self.shape, self.dtype, self.boxes, tuple(tensors))


class CheckpointWriter:
    """Writes one checkpoint at a time, beside the process that calls it.

    Args:
        ranks: The processes of the run.
        asynchronous: Whether to write in processes of their own; otherwise a save returns when it is published.
    """

    def __init__(self, ranks: Ranks = ALONE, asynchronous: bool = True):
        self.ranks = ranks
        self.asynchronous = asynchronous
        self._process: subprocess.Popen | None = None
        self._connection: Connection | None = None
        self._memory: SharedMemory | None = None
        self._store: dist.Store | None = None
        self._is_ready = self._is_busy = False
        self._begun = self._noticed = 0.0
        self._outcome: AnyPath | BaseException | None = None

    def start(self) -> None:
        """Start the writers; they get ready while training goes on. Every process of the run calls this."""
        if not self.asynchronous or self._process is not None:
            return
        address = None
        if self.ranks.world_size > 1:
            self._store, address = serve_store(self.ranks)
        ours, theirs = socket.socketpair()
        with theirs:
            environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'MKL_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}
            root = str(Path(__file__).parents[2])  # also where the package is used from a source tree
            environment['PYTHONPATH'] = os.pathsep.join(filter(None, (root, os.environ.get('PYTHONPATH'))))
            command = [sys.executable, '-m', 'lakonlab.parallel.writer_process', str(theirs.fileno())]
            with signals_held():  # one that reaches the new process too must not end it before it ignores them
                self._process = subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()])
        self._connection = Connection(ours.detach())
        self._connection.send((os.getpid(), self.ranks.rank, self.ranks.world_size, address))

    def submit(self, job: SaveJob, parts: Parts) -> None:
        """Begin to write a checkpoint, after the one before. Every process of the run calls this.

        Args:
            job: The checkpoint.
            parts: Part -> name -> what this process holds; free to change when this returns.

        Raises:
            CheckpointError: The checkpoint before failed; or this one, if nothing is written in the background.
        """
        self.wait()
        if not self.asynchronous:
            self._outcome = job.write(parts, self.ranks)
            return
        self.start()
        entries = [(part, name, pieces) for part, named in parts.items() for name, pieces in named.items()]
        tensors = [tensor for _, _, pieces in entries for tensor in pieces.tensors]
        spans = list(positions(tensors))
        fresh = self._reserve(max((end for _, end in spans), default=0))
        for tensor, (start, _) in zip(tensors, spans):
            self._memory.tensor(start, tuple(tensor.shape), tensor.dtype).copy_(tensor)
        starts = iter(spans)
        layouts: dict[str, dict[str, Layout]] = {part: {} for part in parts}
        for part, name, pieces in entries:
            own = tuple(next(starts)[0] for _ in pieces.tensors)
            layouts[part][name] = Layout(pieces.shape, pieces.dtype, pieces.boxes, own)
        self._send(job, layouts, self._memory.size if fresh else None)
        self._is_busy = True
        self._begun = self._noticed = time.monotonic()

    def _reserve(self, size: int) -> bool:
        """Make sure that there is shared memory of a size; True if it is new."""
        if self._memory is not None and self._memory.size >= size:
            return False
        if self._memory is not None:
            self._memory.close()
        self._memory = SharedMemory(size)
        return True

    def _send(self, job: SaveJob, layouts: Mapping[str, Mapping[str, Layout]], memory_size: int | None) -> None:
        try:
            self._connection.send((job, layouts, memory_size))
            if memory_size is not None:
                reduction.send_handle(self._connection, self._memory.descriptor, self._process.pid)
        except OSError as error:
            raise self._ended() from error

    def has_failed(self) -> bool:
        """Whether this process's writer has failed or ended; costs nothing."""
        self._listen()
        return isinstance(self._outcome, BaseException)

    def wait(self) -> AnyPath | None:
        """Wait until the checkpoint that was begun last is published. Every process of the run calls this.

        Returns:
            Its directory; None if nobody asked for one since.

        Raises:
            CheckpointError: It failed in one of the processes; the same in all of them, reported once.
        """
        if not self.asynchronous or self.ranks.world_size == 1:
            while self._is_busy and not isinstance(self._outcome, BaseException):
                self._wait_a_little()
            if self._is_busy:
                self._process.kill()
                self._is_busy = False
            return self._taken()
        while True:
            if self._is_busy:
                self._wait_a_little()
            beat()
            is_busy, errors = self._news()
            if errors:
                if self._is_busy:
                    self._listen(GRACE_SECONDS)
                _, errors = self._news()
                self._abandon()
                ended = [error for error in errors if isinstance(error, WriterEndedError)]
                raise self.ranks.common([*ended, *errors][0])
            if not is_busy:
                return self._taken()

    def _wait_a_little(self) -> None:
        """Listen for a moment; say so if the disk is slow, which is no hang, and give up what takes all too long."""
        self._listen(POLL_SECONDS)
        beat()
        now = time.monotonic()
        if not self._is_busy or now - self._noticed < NOTICE_SECONDS:
            return
        self._noticed = now
        seconds = now - self._begun
        if seconds > WRITE_SECONDS:
            self._outcome = CheckpointError(
                f'a checkpoint has not been written within {seconds:.0f} s and is given up; what was saved before is '
                'untouched. See whether the file system of checkpoint_config.out_dir answers, and run again.'
            )
        else:
            logger.warning('waiting for a checkpoint that has been being written for %.0f s', seconds)

    def _abandon(self) -> None:
        """Give up what is being written; nothing of it has been published, and the next run removes what there is."""
        if self._is_busy:
            self._process.kill()
        self._is_busy, self._outcome = False, None

    def _news(self) -> tuple[bool, list[BaseException]]:
        """Whether any process is still writing, and the errors of all."""
        own = self._outcome if isinstance(self._outcome, BaseException) else None
        everyone = self.ranks.all_gather((self._is_busy, own))
        return any(is_busy for is_busy, _ in everyone), [error for _, error in everyone if error is not None]

    def _taken(self) -> AnyPath | None:
        outcome, self._outcome = self._outcome, None
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def finished(self) -> AnyPath | None:
        """The directory of a checkpoint that was published since the last question; None if there is none."""
        self._listen()
        return None if isinstance(self._outcome, BaseException) else self._taken()

    def _listen(self, seconds: float = 0) -> None:
        """Take in what the writer says, if it says something within some seconds."""
        if self._connection is None:
            return
        try:
            if not self._connection.poll(seconds):
                return
            message = self._connection.recv()
        except (EOFError, OSError):
            message = self._ended()
        if isinstance(message, str) and message == READY:
            self._is_ready = True
        else:
            self._outcome, self._is_busy = message, False

    def _ended(self) -> WriterEndedError:
        try:
            code = self._process.wait(1)  # its end may be noticed before it is over
        except subprocess.TimeoutExpired:
            code = None
        how = '' if code is None else f' with exit code {code}'
        where = f' of rank {self.ranks.rank}' if self.ranks.world_size > 1 else ''
        return WriterEndedError(
            f'the process{where} that writes checkpoints has ended{how}; what it was writing is lost, what was saved '
            'before is untouched. If it was killed for lack of memory, set checkpoint_config.asynchronous=False.'
        )

    def close(self) -> AnyPath | None:
        """Wait for what this process's writer is writing, and end it.

        Other processes of the run are not waited for, as they may have failed.

        Returns:
            The directory of the checkpoint that was begun last; None if nobody asked for one since.

        Raises:
            CheckpointError: It failed.
        """
        try:
            deadline = time.monotonic() + START_SECONDS
            while self._is_busy and (self._is_ready or time.monotonic() < deadline):
                self._wait_a_little()
                if isinstance(self._outcome, BaseException):
                    break
            if self._is_busy:
                outcome = self._outcome
                self._abandon()
                raise outcome or CheckpointError(
                    'the processes that write checkpoints have not found each other, so nothing was saved; look for '
                    'the error of another process of this run'
                )
            return self._taken()
        finally:
            if self._process is not None:
                self._connection.close()
                try:
                    self._process.wait(GRACE_SECONDS)
                except subprocess.TimeoutExpired:
                    self._process.kill()
                    self._process.wait()
                self._process = self._connection = None
            if self._memory is not None:
                self._memory.close()
                self._memory = None
            self._store = None
