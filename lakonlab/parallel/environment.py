"""Which process of how many this is: what launchers write into environment variables."""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field

logger = logging.getLogger('lakonlab.parallel')

LAUNCHERS = ('none', 'pytorch', 'slurm', 'mpi')
"""Values of ``--launcher``."""

HOW_TO_START = {
    'pytorch': 'start the command with torchrun',
    'slurm': 'start the command with srun, one task for each process',
    'mpi': 'start the command with mpirun or mpiexec',
}
MPI_VARIABLES = (
    # Open MPI; MVAPICH2; MPICH, Intel MPI and others whose processes are started by Hydra or PALS
    ('OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_SIZE', 'OMPI_COMM_WORLD_LOCAL_RANK', 'OMPI_COMM_WORLD_LOCAL_SIZE'),
    ('MV2_COMM_WORLD_RANK', 'MV2_COMM_WORLD_SIZE', 'MV2_COMM_WORLD_LOCAL_RANK', 'MV2_COMM_WORLD_LOCAL_SIZE'),
    ('PMI_RANK', 'PMI_SIZE', 'MPI_LOCALRANKID', 'MPI_LOCALNRANKS'),
    ('PMI_RANK', 'PMI_SIZE', 'PMI_LOCAL_RANK', 'PMI_LOCAL_SIZE'),
)
"""Rank, number of processes, and both on the node, in the names of each implementation."""
MPI_JOBS = ('PMIX_NAMESPACE', 'OMPI_MCA_ess_base_jobid', 'PMI_JOBID', 'SLURM_JOB_ID', 'PBS_JOBID', 'LSB_JOBID')
SLURM_NODE_LISTS = ('SLURM_STEP_NODELIST', 'SLURM_JOB_NODELIST', 'SLURM_NODELIST')
DEFAULT_PORT = 29500
DERIVED_PORTS = range(15000, 31000)
"""Ports for jobs that name none: above those of services, below those that kernels give to outgoing connections."""


class LaunchError(ValueError):
    """Processes cannot form a group: what a launcher says is missing or inconsistent, or the machine lacks devices."""


@dataclass(frozen=True)
class Placement:
    """Which process this is, and where all of them meet.

    Args:
        rank: Number of this process, ``0 <= rank < world_size``.
        world_size: Number of processes.
        local_rank: Number of this process on its node.
        local_world_size: Number of processes on this node.
        master_address: Node of process 0.
        master_port: Port on which process 0, or its launcher, listens.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_address: str
    master_port: int


def read_placement(launcher: str, environment: Mapping[str, str], port: int | None = None) -> Placement | None:
    """Read what a launcher says.

    Args:
        launcher: One of :data:`LAUNCHERS`.
        environment: Environment variables.
        port: ``dist_params.port``; under ``slurm`` and ``mpi`` it comes before MASTER_PORT, which comes before a port
            that is derived from the job.

    Returns:
        None for the launcher ``none``, which is one process on its own.

    Raises:
        LaunchError: A variable is missing or contradicts another one; the message names it.
    """
    if launcher not in LAUNCHERS:
        raise LaunchError(f'launcher: found {launcher!r}, expected one of {", ".join(LAUNCHERS)}')
    if port is not None and (isinstance(port, bool) or not isinstance(port, int) or not 0 < port < 2**16):
        raise LaunchError(f'dist_params.port: found {port!r}, expected a port, 1 to 65535')
    if launcher == 'none':
        _refuse_part_of_a_group(environment)
        return None
    reader = _Reader(launcher, environment)
    return {'pytorch': _read_torchrun, 'slurm': _read_slurm, 'mpi': _read_mpi}[launcher](reader, port)


def expand_node_list(text: str) -> list[str]:
    """The names in a Slurm node list: ``node[01-03,7],login`` -> node01, node02, node03, node7, login.

    Args:
        text: Names and name patterns, separated by commas; numbers of a range keep the width of its first one.

    Raises:
        LaunchError: It is no such list.
    """
    entries = re.findall(r'(?:[^\s,\[\]]|\[[^\s\[\]]*\])+', text)
    if not entries or ','.join(entries) != text:
        raise LaunchError(f'found {text!r}, expected a list of nodes such as node[01-03,7]')
    return [name for entry in entries for name in _expand_pattern(entry, text)]


def node_names(text: str) -> list[str]:
    """The same by Slurm's own ``scontrol`` where it is installed, which knows every notation of its version.

    Args:
        text: A Slurm node list.

    Raises:
        LaunchError: It is no such list.
    """
    scontrol = shutil.which('scontrol')
    if scontrol is not None:
        try:
            done = subprocess.run(
                [scontrol, 'show', 'hostnames', text], capture_output=True, text=True, timeout=60, check=True
            )
            if names := done.stdout.split():
                return names
        except (OSError, subprocess.SubprocessError) as error:
            logger.debug('scontrol cannot expand %r: %s', text, error)
    return expand_node_list(text)


def num_cpus() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


@dataclass(frozen=True)
class _Reader:
    """Reads numbers from an environment; errors say who should have set them."""

    launcher: str
    environment: Mapping[str, str] = field(repr=False)

    def has(self, name: str) -> bool:
        return bool(self.environment.get(name))

    def first_of(self, names: tuple[str, ...]) -> str | None:
        """The first of several variables that is set."""
        return next((name for name in names if self.has(name)), None)

    def text(self, name: str) -> str:
        if not self.has(name):
            raise self.error(f'{name} is not set; {HOW_TO_START[self.launcher]}, which sets it')
        return self.environment[name]

    def number(self, name: str, least: int = 0, most: int | None = None, why: str = '') -> int:
        text = self.text(name)
        limits = f'{least} to {most}' if most is not None else f'at least {least}'
        if not re.fullmatch(r'\s*\d+\s*', text) or int(text) < least or (most is not None and int(text) > most):
            raise self.error(f'{name}={text}: expected a whole number, {limits}{why}')
        return int(text)

    def part(self, rank_name: str, size_name: str, most: int | None = None) -> tuple[int, int]:
        """Number of a process among several, and how many those are."""
        size = self.number(size_name, least=1, most=most, why=' (all processes)' if most is not None else '')
        return self.number(rank_name, most=size - 1, why=f' (below {size_name}={size})'), size

    def port(self, port: int | None, job: str | None) -> int:
        if port is not None:
            return port
        if self.has('MASTER_PORT'):
            return self.number('MASTER_PORT', least=1, most=2**16 - 1)
        if job is None:
            return DEFAULT_PORT
        return DERIVED_PORTS[zlib.crc32(job.encode()) % len(DERIVED_PORTS)]

    def error(self, message: str) -> LaunchError:
        return LaunchError(f'--launcher {self.launcher}: {message}')


def _read_torchrun(reader: _Reader, port: int | None) -> Placement:
    if port is not None:
        logger.info('dist_params.port=%d has no effect with --launcher pytorch; torchrun sets MASTER_PORT', port)
    rank, world_size = reader.part('RANK', 'WORLD_SIZE')
    local_rank, local_world_size = reader.part('LOCAL_RANK', 'LOCAL_WORLD_SIZE', most=world_size)
    address, port = reader.text('MASTER_ADDR'), reader.number('MASTER_PORT', least=1, most=2**16 - 1)
    return Placement(rank, world_size, local_rank, local_world_size, address, port)


def _read_slurm(reader: _Reader, port: int | None) -> Placement:
    # a step may have fewer tasks than its job
    size_name = 'SLURM_STEP_NUM_TASKS' if reader.has('SLURM_STEP_NUM_TASKS') else 'SLURM_NTASKS'
    rank, world_size = reader.part('SLURM_PROCID', size_name)
    local_world_size, where = _slurm_tasks_of_this_node(reader, world_size)
    local_rank = reader.number('SLURM_LOCALID', most=local_world_size - 1, why=f' (below {where})')
    address = reader.environment.get('MASTER_ADDR') or _first_slurm_node(reader)
    job = None
    if port is None and not reader.has('MASTER_PORT'):  # two steps of one job may share a node
        job = f'{reader.text("SLURM_JOB_ID")}.{reader.environment.get("SLURM_STEP_ID", 0)}'
    return Placement(rank, world_size, local_rank, local_world_size, address, reader.port(port, job))


def _first_slurm_node(reader: _Reader) -> str:
    name = reader.first_of(SLURM_NODE_LISTS) or SLURM_NODE_LISTS[0]
    text = reader.text(name)
    try:
        return node_names(text)[0]
    except LaunchError as error:
        raise reader.error(f'{name}: {error}') from error


def _slurm_tasks_of_this_node(reader: _Reader, world_size: int) -> tuple[int, str]:
    """How many processes run on this node, and the variable that says so."""
    name = 'SLURM_STEP_TASKS_PER_NODE'
    if not reader.has(name):
        name = 'SLURM_NTASKS_PER_NODE'
        size = reader.number(name, least=1, most=world_size, why=' (all tasks)')
        return size, f'{name}={size}'
    text = reader.text(name)
    counts: list[int] = []
    for entry in text.split(','):
        match = re.fullmatch(r'(\d+)(?:\(x(\d+)\))?', entry)
        if match is None:
            raise reader.error(f'{name}={text}: expected numbers of tasks such as 8(x3),4')
        counts += [int(match[1])] * int(match[2] or 1)
    if sum(counts) != world_size:
        raise reader.error(f'{name}={text}: expected {world_size} tasks in all, as many as the step has')
    node = reader.number('SLURM_NODEID', most=len(counts) - 1, why=f' (a node of {name}={text})')
    return counts[node], f'{counts[node]} of {name}={text}'


def _read_mpi(reader: _Reader, port: int | None) -> Placement:
    rank_name, size_name, local_rank_name, local_size_name = _mpi_names(reader)
    rank, world_size = reader.part(rank_name, size_name)
    local_rank, local_world_size = reader.part(local_rank_name, local_size_name, most=world_size)
    address = reader.environment.get('MASTER_ADDR')
    if not address and local_world_size < world_size:
        raise reader.error(
            f'MASTER_ADDR is not set, and {size_name}={world_size} processes run on several nodes '
            f'({local_size_name}={local_world_size}); expected the name of the node of process 0, for example '
            'mpirun -x MASTER_ADDR=$(hostname)'
        )
    job_name = reader.first_of(MPI_JOBS)
    port = reader.port(port, reader.environment[job_name] if job_name else None)
    return Placement(rank, world_size, local_rank, local_world_size, address or '127.0.0.1', port)


def _mpi_names(reader: _Reader) -> tuple[str, str, str, str]:
    """The names that the MPI at hand uses: those of which most are set, so that an error names the missing one."""
    present = {names: sum(reader.has(name) for name in names) for names in MPI_VARIABLES}
    best = max(MPI_VARIABLES, key=present.__getitem__)
    if present[best] == 0:
        ranks = ', '.join(dict.fromkeys(names[0] for names in MPI_VARIABLES))
        raise reader.error(f'none of {ranks} is set; {HOW_TO_START["mpi"]}, which sets one')
    return best


def _expand_pattern(pattern: str, whole: str) -> list[str]:
    match = re.fullmatch(r'([^\[]*)\[([^\]]*)\](.*)', pattern)
    if match is None:
        return [pattern]
    head, ranges, rest = match.groups()
    numbers: list[str] = []
    for entry in ranges.split(','):
        bounds = re.fullmatch(r'(\d+)(?:-(\d+))?', entry)
        if bounds is None or int(bounds[2] or bounds[1]) < int(bounds[1]):
            raise LaunchError(f'found [{ranges}] in {whole!r}, expected numbers and ranges such as [01-03,7]')
        first, last = int(bounds[1]), int(bounds[2] or bounds[1])
        numbers += [f'{number:0{len(bounds[1])}d}' for number in range(first, last + 1)]
    return [head + number + tail for number in numbers for tail in _expand_pattern(rest, whole)]


def _refuse_part_of_a_group(environment: Mapping[str, str]) -> None:
    """A process of several that does not know it would train alone, and write over what the others write."""
    count = environment.get('WORLD_SIZE') or '1'
    if count != '1':
        raise LaunchError(
            f'--launcher none: WORLD_SIZE={count} says that this is one of several processes, expected one; add '
            '--launcher pytorch, or unset the variable if it is left over'
        )
    sizes = {'SLURM_STEP_NUM_TASKS': 'slurm', **{names[1]: 'mpi' for names in MPI_VARIABLES}}
    for name, launcher in sizes.items():
        if (environment.get(name) or '1') != '1':  # no error: the processes may be runs of their own
            logger.warning(
                '%s=%s: this is one of several processes and runs on its own; add --launcher %s if it should not',
                name,
                environment[name],
                launcher,
            )
            return
