"""Runs a function in several processes that form one gloo group.

The processes are forked from one server that has imported torch, so that a test pays for the group but not for the
imports. Functions and results travel pickled, by value; functions have to stand at the top of a module.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection, forkserver, util
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
START_SECONDS = 180.0
"""Limit for importing torch in the fork server and forming the group."""
CLOSE_SECONDS = 20.0
COLLECTIVE_SECONDS = 60.0
GRACE_SECONDS = 0.3
"""How long other processes may still report after the first failure, which may be the consequence of theirs."""
OUTPUT_CHARACTERS = 8000
# Code under test may claim the usual signals and faulthandler's timer, but hardly this one.
STACKS_SIGNAL = signal.SIGRTMAX - 1


class ProcessFailedError(RuntimeError):
    """A function failed in one of its processes, or the process ended before the function did.

    Args:
        message: Tracebacks and output of the processes.
        rank: The process that failed first.
    """

    def __init__(self, message: str, rank: int):
        super().__init__(message)
        self.rank = rank


class ProcessesHangError(RuntimeError):
    """A function did not return in time in every process."""


def run_processes(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0, **kwargs: Any
) -> list[Any]:
    """Call ``function(ranks, *args, **kwargs)`` in new processes that form one gloo group.

    Args:
        function: Stands at the top of a module; ``ranks`` is a :class:`~lakonlab.ranks.Ranks`.
        world_size: Number of processes; one process is a new one too.
        *args: Pickled.
        timeout: Seconds from the moment that the group stands.
        **kwargs: Pickled.

    Returns:
        Results by rank.

    Raises:
        ProcessFailedError: The function raised, or a process died; the others are killed.
        ProcessesHangError: Time is up; all processes are killed, and the message has their stacks.
    """
    with ProcessPool(world_size) as pool:
        return pool.run(function, *args, timeout=timeout, **kwargs)


class ProcessPool:
    """Processes that form one gloo group and call one function after the other.

    After a failure the processes are killed, and the next call starts new ones. The global random state is seeded
    alike in every process before each call.

    Args:
        world_size: Number of processes.
    """

    def __init__(self, world_size: int):
        self.world_size = world_size
        self._children: list[_Child] = []
        self._end: util.Finalize | None = None

    @property
    def pids(self) -> list[int]:
        """Process ids by rank; empty while no process runs."""
        return [child.process.pid for child in self._children]

    def __enter__(self) -> ProcessPool:
        self._start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.kill()

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 120.0, **kwargs: Any) -> list[Any]:
        """Call ``function(ranks, *args, **kwargs)`` in every process; see :func:`run_processes`.

        Args:
            function: Stands at the top of a module.
            *args: Pickled.
            timeout: Seconds.
            **kwargs: Pickled.

        Returns:
            Results by rank.

        Raises:
            ProcessFailedError: The function raised, or a process died.
            ProcessesHangError: Time is up.
        """
        # The plain pickler copies tensors; the one of multiprocessing sends handles that die with their process.
        request = pickle.dumps((function, args, kwargs))
        if not self._children:
            self._start()
        return [pickle.loads(result) for result in self._call(request, timeout)]

    def close(self) -> None:
        """Destroy the group and end the processes, with whatever they have started."""
        try:
            if self._children:
                self._call(b'', CLOSE_SECONDS)
        finally:
            self.kill()

    def kill(self) -> None:
        """End the processes at once."""
        if self._end is not None:
            self._end()
        self._children, self._end = [], None

    def _start(self) -> None:
        self.kill()
        context = _fork_server()
        folder = tempfile.TemporaryDirectory(prefix='processes-')
        children = self._children = []
        # Called at the latest when Python exits, before multiprocessing waits for its children.
        self._end = util.Finalize(self, _kill, (children, folder), exitpriority=100)
        # The socket is bound here and handed to the store of rank 0: no port is free now and taken a moment later.
        with socket.socket() as listener:
            listener.bind(('127.0.0.1', 0))
            listener.listen(self.world_size + 8)
            for rank in range(self.world_size):
                ours, theirs = context.Pipe()
                files = Path(folder.name, f'output{rank}.txt'), Path(folder.name, f'stacks{rank}.txt')
                arguments = (theirs, rank, self.world_size, listener if rank == 0 else None, listener.getsockname()[1])
                process = context.Process(target=_serve, args=(*arguments, *files), name=f'rank {rank}')
                process.start()
                theirs.close()
                children.append(_Child(rank, process, ours, *files))
        self._collect(START_SECONDS, [0] * self.world_size)

    def _call(self, request: bytes, timeout: float) -> list[bytes]:
        offsets = [child.output.stat().st_size for child in self._children]
        for child in self._children:
            with contextlib.suppress(OSError):  # a process that is gone is found while waiting for its answer
                child.connection.send_bytes(request)
        return self._collect(timeout, offsets)

    def _collect(self, timeout: float, offsets: list[int]) -> list[bytes]:
        try:
            return _collect(self._children, timeout, offsets)
        except BaseException:
            self.kill()
            raise


@pytest.fixture(scope='module')
def workers(request: pytest.FixtureRequest) -> Iterator[ProcessPool]:
    """Two processes for the tests of a module; another number by indirect parametrisation."""
    pool = ProcessPool(getattr(request, 'param', 2))
    yield pool
    pool.close()


@dataclass(frozen=True)
class _Child:
    """What the parent knows of a process."""

    rank: int
    process: Any
    connection: connection.Connection
    output: Path
    stacks: Path

    def text(self, offset: int) -> str:
        """What the process has printed since its output had that many bytes, the end of it if that is long."""
        with contextlib.suppress(OSError), self.output.open('rb') as file:
            file.seek(offset)
            printed = file.read().decode(errors='replace').strip()
            if printed:
                return f'--- output of rank {self.rank} ---\n{printed[-OUTPUT_CHARACTERS:]}\n'
        return ''


@dataclass(frozen=True)
class _Report:
    """What a process answers: a pickled result, or a traceback and when it was raised."""

    result: bytes | None = None
    error: str = ''
    moment: float = 0.0


def _fork_server() -> multiprocessing.context.BaseContext:
    """Start the server of this Python process if there is none."""
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['tests.preloaded'])
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get('PYTHONPATH'))))
    # Threads do not survive a fork: what the server imports must not start any.
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (('OMP_NUM_THREADS', '1'), ('MKL_NUM_THREADS', '1'), ('PYTHONPATH', path)):
            patch.setenv(name, value)
        forkserver.ensure_running()
    return context


def _collect(children: list[_Child], timeout: float, offsets: list[int]) -> list[bytes]:
    """Wait for one report of every process; results by rank."""
    deadline = time.monotonic() + timeout
    waiting = {child.rank: child for child in children}
    results: dict[int, bytes] = {}
    failures: list[tuple[float, int, str]] = []
    while waiting:
        handles = [handle for child in waiting.values() for handle in (child.connection, child.process.sentinel)]
        ready = connection.wait(handles, max(deadline - time.monotonic(), 0))
        if not ready:
            break
        for rank, child in list(waiting.items()):
            if child.connection not in ready and child.process.sentinel not in ready:
                continue
            del waiting[rank]
            try:
                if not child.connection.poll():
                    raise EOFError
                report: _Report = pickle.loads(child.connection.recv_bytes())
            except (EOFError, OSError):
                child.process.join(5)
                # A process that ends without a word did not fail because of the others, but they fail because of it.
                failures.append((0.0, rank, f'The process ended with exit code {child.process.exitcode}.\n'))
            else:
                if report.result is None:
                    failures.append((report.moment, rank, report.error))
                else:
                    results[rank] = report.result
        if failures:
            deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
    printed = ''.join(child.text(offset) for child, offset in zip(children, offsets))
    if failures:
        failures.sort()
        tracebacks = ''.join(f'--- rank {rank} ---\n{text}' for _, rank, text in failures)
        first = failures[0][1]
        raise ProcessFailedError(f'rank {first} of {len(children)} failed\n{tracebacks}{printed}', first)
    if waiting:
        raise ProcessesHangError(
            f'no answer within {timeout:g} s from ranks {sorted(waiting)} of {len(children)}\n'
            f'{_stacks(children)}{printed}'
        )
    return [results[rank] for rank in range(len(children))]


def _stacks(children: list[_Child]) -> str:
    """The stacks of all threads of all processes."""
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.process.pid, STACKS_SIGNAL)
    texts: dict[int, str] = {}
    previous, until = None, time.monotonic() + 2
    # Stacks are written by another process, so they are complete when all are there and have stopped growing.
    while time.monotonic() < until and not (previous == texts and all(texts.values())):
        previous = texts
        time.sleep(0.05)
        texts = {child.rank: child.stacks.read_text() if child.stacks.exists() else '' for child in children}
    return ''.join(f'--- stacks of rank {rank} ---\n{text}' for rank, text in texts.items())


def _kill(children: list[_Child], folder: tempfile.TemporaryDirectory) -> None:
    for child in children:
        try:
            os.killpg(child.process.pid, signal.SIGKILL)  # it leads a group of its own, of what it has started
        except ProcessLookupError:
            child.process.kill()
    for child in children:
        child.process.join()
        child.process.close()
        child.connection.close()
    children.clear()
    folder.cleanup()


def _serve(
    requests: connection.Connection,
    rank: int,
    world_size: int,
    listener: socket.socket | None,
    port: int,
    output: Path,
    stacks: Path,
) -> None:
    """Life of a process: form the group, answer requests until an empty one, wait to be killed."""
    os.setsid()
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _redirect(output)
    faulthandler.enable()
    # Kept open for as long as the process lives: the handler writes to the descriptor.
    stacks_file = stacks.open('w')
    faulthandler.register(STACKS_SIGNAL, stacks_file, all_threads=True)
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))

    ranks: Any = None

    def answer(request: bytes) -> Any:
        from lakonlab.runner.seeding import seed_globals

        function, args, kwargs = pickle.loads(request)
        seed_globals(0)
        return function(ranks, *args, **kwargs)

    def begin() -> None:
        nonlocal ranks
        ranks = _form_group(rank, world_size, listener, port)

    requests.send_bytes(pickle.dumps(_report(begin)))
    with contextlib.suppress(EOFError):
        while request := requests.recv_bytes():
            requests.send_bytes(pickle.dumps(_report(lambda request=request: answer(request))))
        requests.send_bytes(pickle.dumps(_report(_destroy_group)))
        requests.recv_bytes()


def _report(function: Callable[[], Any]) -> _Report:
    try:
        return _Report(pickle.dumps(function()))
    except BaseException as error:
        moment = time.monotonic()  # one clock for all processes
        error.__traceback__ = error.__traceback__ and error.__traceback__.tb_next
        return _Report(error=''.join(traceback.format_exception(error)), moment=moment)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _redirect(output: Path) -> None:
    """Send what Python and libraries print to a file."""
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
        os.dup2(descriptor, number)
        stream.reconfigure(line_buffering=True)
    os.close(descriptor)


def _die_with_parent() -> None:
    connection.wait([multiprocessing.parent_process().sentinel])
    os.killpg(0, signal.SIGKILL)


def _form_group(rank: int, world_size: int, listener: socket.socket | None, port: int) -> Any:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR='127.0.0.1',
        MASTER_PORT=str(port),
        GLOO_SOCKET_IFNAME='lo',
    )
    import torch
    import torch.distributed as dist

    from lakonlab.ranks import Ranks

    torch.set_num_threads(1)
    limit = timedelta(seconds=COLLECTIVE_SECONDS)
    store = dist.TCPStore(
        '127.0.0.1',
        port,
        world_size,
        is_master=rank == 0,
        timeout=limit,
        master_listen_fd=listener.detach() if listener is not None else None,
    )
    dist.init_process_group('gloo', store=store, rank=rank, world_size=world_size, timeout=limit)
    return Ranks(rank, world_size, rank, world_size)


def _destroy_group() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
