"""The program of a process that writes checkpoints; see :mod:`lakonlab.parallel.checkpoint_writer`."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from datetime import timedelta
from multiprocessing import reduction
from multiprocessing.connection import Connection
from typing import Any

WATCH_SECONDS = 0.1
GROUP_TIMEOUT = timedelta(hours=1)
JOIN_TIMEOUT = timedelta(minutes=5)
PR_SET_PDEATHSIG = 1
READY = 'ready'
"""What a writer says when it has found the others."""


def main(descriptor: int) -> None:
    """Serve one process until it closes the connection.

    Args:
        descriptor: File descriptor of the connection.
    """
    # a signal to all processes of a terminal or a job means the run, which tells this process what to do
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        os.nice(10)  # training comes first
    connection = Connection(descriptor)
    greeting = _next(connection)
    if greeting is None:
        return
    parent, rank, world_size, address = greeting
    _end_with(parent)
    ranks = _ranks(rank, world_size, address)

    from lakonlab.ranks import portable
    from lakonlab.storage.checkpoint import CheckpointError
    from lakonlab.storage.shared_memory import SharedMemory

    if not _told(connection, READY):
        return
    memory = None
    while (request := _next(connection)) is not None:
        job, layouts, memory_size = request
        if memory_size is not None:
            memory = SharedMemory(memory_size, reduction.recv_handle(connection))
        parts = {
            part: {name: layout.pieces(memory) for name, layout in named.items()} for part, named in layouts.items()
        }
        try:
            outcome = job.write(parts, ranks)
        except Exception as error:  # travels to the process that asked for it
            outcome = portable(error, CheckpointError)
        parts.clear()
        if not _told(connection, outcome):
            return


def _next(connection: Connection) -> Any:
    """What the process of the run asks for; None if it has closed the connection or is gone."""
    try:
        return connection.recv()
    except (EOFError, ConnectionError):
        return None


def _told(connection: Connection, message: Any) -> bool:
    """Whether the process of the run can be told something; False if it is gone, which is no error of this one."""
    try:
        connection.send(message)
    except ConnectionError:
        return False
    return True


def _ranks(rank: int, world_size: int, address: tuple[str, int] | None):
    from lakonlab.ranks import Ranks

    if world_size > 1:
        import torch.distributed as dist

        # those that never come are not waited for as long as those that write
        store = dist.TCPStore(*address, is_master=False, timeout=JOIN_TIMEOUT)
        dist.init_process_group('gloo', store=store, rank=rank, world_size=world_size, timeout=JOIN_TIMEOUT)
        group = dist.new_group(timeout=GROUP_TIMEOUT)
        return Ranks(rank, world_size, group=group)
    return Ranks(rank, world_size)


def _end_with(parent: int) -> None:
    """See to it that this process ends as soon as the one that it belongs to is gone, whatever it is doing."""
    if sys.platform == 'linux':  # the kernel does it, so nothing is published when the next run has begun to look
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(WATCH_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == '__main__':
    main(int(sys.argv[1]))
    os._exit(0)  # the run waits for this process, and taking down the interpreter takes seconds on a busy machine
