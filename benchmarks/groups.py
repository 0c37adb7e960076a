"""Groups of processes that stay alive and work when they are asked to, so that groups can take turns."""

from __future__ import annotations

import os
import socket
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.multiprocessing as multiprocessing

ROOT = Path(__file__).resolve().parents[1]
THREADS = ('OMP_NUM_THREADS', 'MKL_NUM_THREADS')


class Group:
    """Processes, each with one thread, that hold an object each and call its methods.

    Args:
        world_size: Number of processes; they form a process group unless ``alone``.
        make: Called in every process with its ranks and the arguments; at the top of a module.
        *args: Arguments of ``make``.
        alone: Whether the one process belongs to no process group.
        **kwargs: Further arguments of ``make``.
    """

    def __init__(self, world_size: int, make: Callable[..., Any], *args: Any, alone: bool = False, **kwargs: Any):
        context = multiprocessing.get_context('spawn')
        for name in THREADS:  # read by libraries when a process starts
            os.environ[name] = '1'
        with socket.socket() as taken:
            taken.bind(('127.0.0.1', 0))
            port = taken.getsockname()[1]
        self._connections: list[Connection] = []
        self._processes = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            environment = {} if alone else _environment(rank, world_size, port)
            process = context.Process(target=_serve, args=(theirs, environment, make, args, kwargs), daemon=True)
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)
        self._results()

    def call(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        """Call a method in all processes; its results by rank."""
        for connection in self._connections:
            connection.send((method, args, kwargs))
        return self._results()

    def _results(self) -> list[Any]:
        results = []
        for connection in self._connections:
            result, error = connection.recv()
            if error is not None:
                raise RuntimeError(f'a process failed:\n{error}')
            results.append(result)
        return results

    def __enter__(self) -> Group:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for process, connection in zip(self._processes, self._connections):
            if kind is None:
                connection.send(None)
            else:
                process.terminate()
        for process in self._processes:
            process.join()


def _environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What torchrun would say."""
    numbers = {'RANK': rank, 'LOCAL_RANK': rank, 'WORLD_SIZE': world_size, 'LOCAL_WORLD_SIZE': world_size}
    numbers['MASTER_PORT'] = port
    return {'MASTER_ADDR': '127.0.0.1', **{name: str(number) for name, number in numbers.items()}}


def _serve(
    connection: Connection, environment: dict[str, str], make: Callable[..., Any], args: tuple, kwargs: dict[str, Any]
) -> None:
    os.environ.update(environment)
    sys.path.insert(0, str(ROOT))
    import torch

    from lakonlab.parallel.launch import joined_processes

    torch.set_num_threads(1)
    worker = None

    def answer(function: Callable[[], Any]) -> Any:
        try:
            result, error = function(), None
        except Exception:  # told to whoever asked
            result, error = None, traceback.format_exc()
        return result, error

    with joined_processes('pytorch' if environment else 'none', device='cpu') as (ranks, _):

        def begin() -> None:
            nonlocal worker
            worker = make(ranks, *args, **kwargs)

        connection.send(answer(begin))
        while (request := connection.recv()) is not None:
            method, its_args, its_kwargs = request
            connection.send(answer(lambda: getattr(worker, method)(*its_args, **its_kwargs)))
        if hasattr(worker, 'close'):
            worker.close()
