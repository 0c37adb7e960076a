"""Starts a tool in this process, or in several processes of this machine under torch's launcher.

Nothing heavy is imported before it is needed, so that ``--help`` is instant.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import runpy
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from lakonlab.parallel.environment import num_cpus

SECONDS_TO_SAVE = 300
"""How long processes may take to save and leave after a signal, unless TORCH_ELASTIC_SHUTDOWN_TIMEOUT says it."""


def run_tool(tool: Path, arguments: Sequence[str] | None = None) -> int:
    """Run a tool as its command line asks: in one process, or in one for each GPU.

    Args:
        tool: A script with a function ``parse_args`` that reads ``sys.argv``; it knows ``--launcher`` and
            ``--diff_seed``.
        arguments: The command line without the name of the command; None for that of this process.

    Returns:
        The exit status of the tool; of several processes that of the first that failed, and 128 + n after signal n.
    """
    parser = _parser(tool)
    own, passed_on = parser.parse_known_args(arguments)
    with _command_line(tool, passed_on):  # wrong arguments end this process, instead of every process later
        read = runpy.run_path(str(tool), run_name='lakonlab.tool')['parse_args']()
    if read.launcher != 'none':
        parser.error(f'--launcher {read.launcher}: this command is a launcher itself; run tools/{tool.name} instead')
    if own.gpu_ids is not None:
        if len(set(own.gpu_ids)) < len(own.gpu_ids):
            parser.error(f'argument --gpu-ids: found {own.gpu_ids}, expected every GPU once')
        os.environ['CUDA_VISIBLE_DEVICES'] = ','.join(map(str, own.gpu_ids))
        os.environ.setdefault('CUDA_DEVICE_ORDER', 'PCI_BUS_ID')  # the order of nvidia-smi
    count = len(own.gpu_ids) if own.gpu_ids is not None else own.processes
    if (count == 1 and not own.force_ddp) or getattr(read, 'dry_run', False):
        return _run_here(tool, passed_on)
    return _run_in_processes(count, tool, passed_on)


def _parser(tool: Path) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage=f'%(prog)s CONFIG [--gpu-ids N [N ...] | --processes N] [--force-ddp] [arguments of tools/{tool.name}]',
        description=f'Run tools/{tool.name} on one machine, in one process for each GPU.',
        epilog=f'All other arguments are those of tools/{tool.name}; its --help lists them. For several machines see '
        'docs/launch.md.',
        allow_abbrev=False,
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        '--gpu-ids', type=_gpu, nargs='+', metavar='N', help='GPUs to use, as nvidia-smi numbers them (default: one)'
    )
    where.add_argument(
        '--processes', type=_count, default=1, metavar='N', help='use the first N GPUs; without GPUs, N CPU processes'
    )
    parser.add_argument('--force-ddp', action='store_true', help='run even one process as a group, like several')
    return parser


def _gpu(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f'found {text!r}, expected the number of a GPU; the config comes first')
    return int(text)


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'found {text!r}, expected a positive number')
    return int(text)


@contextlib.contextmanager
def _command_line(tool: Path, arguments: Sequence[str]) -> Iterator[None]:
    """Make ``sys.argv`` what it would be if the tool had been started with these arguments."""
    previous, sys.argv = sys.argv, [str(tool), *arguments]
    try:
        yield
    finally:
        sys.argv = previous


def _run_here(tool: Path, arguments: Sequence[str]) -> int:
    with _command_line(tool, arguments):
        runpy.run_path(str(tool), run_name='__main__')  # ends by SystemExit, which is the exit status here too
    return 0


def _run_in_processes(count: int, tool: Path, arguments: Sequence[str]) -> int:
    # the libraries of the processes read it when they start, and each would otherwise take all cores
    os.environ.setdefault('OMP_NUM_THREADS', str(max(1, num_cpus() // count)))
    os.environ.setdefault('TORCH_ELASTIC_SHUTDOWN_TIMEOUT', str(SECONDS_TO_SAVE))
    try:
        return _launch(count, [str(tool), *arguments, '--launcher', 'pytorch', '--diff_seed'])
    except KeyboardInterrupt:  # before there are processes; later torch's launcher handles signals
        return 128 + signal.SIGINT


def _launch(count: int, command: Sequence[str]) -> int:
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=f'{Path(command[0]).stem}-{os.getpid()}',
        rdzv_backend='c10d',
        rdzv_endpoint='localhost:0',  # a free port that nobody can take in between: the launcher itself listens on it
        local_addr='localhost',
        max_restarts=0,
    )
    escaped = [argument.replace('$', '$$') for argument in command]  # the launcher substitutes ${local_rank}
    try:
        elastic_launch(config, sys.executable)('-u', *escaped)
    except SignalException as stopped:
        return 128 + stopped.sigval
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        status = failure.exitcode
        how = f'exit status {status}' if status > 0 else signal.Signals(-status).name
        print(f'error: process {rank} of {count} ended with {how}', file=sys.stderr)  # noqa: T201
        return status if status > 0 else 128 - status
    return 0
