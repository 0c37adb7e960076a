"""Joining the processes that a launcher has started, each with a device of its own."""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from lakonlab.parallel.environment import LaunchError, Placement, num_cpus, read_placement
from lakonlab.ranks import ALONE, Ranks

logger = logging.getLogger('lakonlab.parallel')

DEFAULT_TIMEOUT = 3600


def start_processes(
    launcher: str, dist_params: Mapping[str, Any] | None = None, device: str | torch.device | None = None
) -> tuple[Ranks, torch.device]:
    """Join the group of all processes of a run.

    Afterwards the default group of torch.distributed exists, for gradients and weights; plain data has a gloo group of
    its own, so that it never waits behind gradients. The launcher ``none`` starts no group.

    Args:
        launcher: ``none``, ``pytorch`` (torchrun), ``slurm`` or ``mpi``: who started this process.
        dist_params: ``backend`` (by default nccl on CUDA, gloo on CPUs), ``timeout`` in seconds, ``port``.
        device: Device of this process; None for the GPU whose number is that of the process on its node, or the CPU if
            there are no GPUs.

    Returns:
        Which process this is, and its device.

    Raises:
        LaunchError: The environment does not say what the launcher should, there are fewer GPUs than processes, or the
            processes do not find each other.
    """
    settings = _Settings.of(dist_params)
    placement = read_placement(launcher, os.environ, settings.port)
    if placement is None:
        return ALONE, choose_device(device, 0, 1)
    if dist.is_initialized():
        raise LaunchError(f'--launcher {launcher}: this process belongs to a group already; stop that one first')
    chosen = choose_device(device, placement.local_rank, placement.local_world_size)
    backend = choose_backend(settings.backend, chosen, log=placement.rank == 0)
    if chosen.type == 'cuda':
        torch.cuda.set_device(chosen)
        torch.cuda.init()  # device meshes choose a device themselves where none is in use yet
    if launcher != 'pytorch':  # torchrun sets OMP_NUM_THREADS
        _share_cpus(placement.local_world_size)
    ranks = _join(placement, backend, timedelta(seconds=settings.timeout))
    if chosen.type == 'cuda' and (device is None or torch.device(device).index is None):
        _refuse_shared_devices(ranks, chosen)
    if ranks.is_main:
        per_node = placement.local_world_size
        logger.info('%d processes, %d on the first node; gradients by %s', ranks.world_size, per_node, backend)
    threads = torch.get_num_threads()
    logger.debug('process %d of %d: %s, CPU threads: %d', ranks.rank, ranks.world_size, chosen, threads)
    return ranks, chosen


def stop_processes(ranks: Ranks) -> None:
    """Wait for all processes, and leave their group.

    Not for a process that has failed: it should end, so that its launcher ends the others, instead of waiting for them.

    Args:
        ranks: What :func:`start_processes` returned.
    """
    if ranks.group is None:
        return
    ranks.barrier()
    dist.destroy_process_group()


@contextlib.contextmanager
def joined_processes(
    launcher: str, dist_params: Mapping[str, Any] | None = None, device: str | torch.device | None = None
) -> Iterator[tuple[Ranks, torch.device]]:
    """:func:`start_processes` for the length of a block; stopped at its end, unless an error ends it.

    Args:
        launcher: As there.
        dist_params: As there.
        device: As there.
    """
    ranks, chosen = start_processes(launcher, dist_params, device)
    yield ranks, chosen
    stop_processes(ranks)


def choose_device(wanted: str | torch.device | None, local_rank: int, local_world_size: int) -> torch.device:
    """The device of a process.

    Args:
        wanted: A device, or only its type; None for a GPU, or the CPU if there are no GPUs.
        local_rank: Number of the process on its node.
        local_world_size: Number of processes on the node.

    Raises:
        LaunchError: There are several GPUs, but fewer than processes. A single one may be all that this process sees of
            many; whether it is shared is found when the processes have joined.
    """
    if wanted is None:
        wanted = 'cuda' if torch.cuda.is_available() else 'cpu'
    device = torch.device(wanted)
    if device.type != 'cuda' or device.index is not None:
        return device
    count = torch.cuda.device_count()
    if count == 0 or 1 < count < local_world_size:
        raise LaunchError(
            f'found {count} GPUs (CUDA_VISIBLE_DEVICES={_visible()}) for {local_world_size} processes of this node, '
            f'expected one for each; start {count} processes per node, or set CUDA_VISIBLE_DEVICES to "" to use CPUs'
        )
    return torch.device('cuda', local_rank % count)


def choose_backend(wanted: str | None, device: torch.device, log: bool = True) -> str:
    """The backend of torch.distributed for gradients and weights.

    Args:
        wanted: ``dist_params.backend``: a name, or names by device such as ``cpu:gloo,cuda:nccl``; None for the usual
            one of the device.
        device: Device of this process.
        log: Whether to say what was not possible.

    Returns:
        What is wanted; gloo on a CPU if a backend for GPUs is wanted, as published configs do.

    Raises:
        LaunchError: This torch does not have it.
    """
    usual = dist.get_default_backend_for_device(device)
    if wanted is None:
        return usual
    names = [part.rpartition(':')[2].lower() for part in wanted.split(',')]
    for name in names:
        if name not in dist.Backend.backend_list or name == dist.Backend.UNDEFINED:
            known = ', '.join(sorted(set(dist.Backend.backend_list) - {dist.Backend.UNDEFINED}))
            raise LaunchError(f'dist_params.backend: found {wanted!r}, expected one of {known}')
    if device.type == 'cpu' and dist.Backend.NCCL in names:
        if log:
            logger.info('dist_params.backend=%r: needs GPUs, there are none; %s instead', wanted, usual)
        return usual
    for name in names:
        if not dist.is_backend_available(name):
            raise LaunchError(
                f'dist_params.backend: found {wanted!r}, but this torch was built without {name}; leave it away for '
                f'{usual}'
            )
    if device.type == 'cuda' and dist.Backend.NCCL not in names and log:
        logger.warning('dist_params.backend=%r: gradients of GPUs are faster with nccl', wanted)
    return wanted.lower()


@dataclass(frozen=True)
class _Settings:
    """``dist_params`` of a config."""

    backend: str | None = None
    timeout: float = DEFAULT_TIMEOUT
    port: int | None = None

    @classmethod
    def of(cls, dist_params: Mapping[str, Any] | None) -> _Settings:
        unknown = sorted(set(dist_params or {}) - set(cls.__dataclass_fields__))
        if unknown:
            raise LaunchError(f'dist_params.{unknown[0]}: no such key; expected {", ".join(cls.__dataclass_fields__)}')
        settings = cls(**(dist_params or {}))
        backend, timeout = settings.backend, settings.timeout
        if backend is not None and not isinstance(backend, str):
            raise LaunchError(f'dist_params.backend: found {backend!r}, expected a name such as gloo')
        is_number = isinstance(timeout, int | float) and not isinstance(timeout, bool)
        if not is_number or not 0 < timeout < math.inf:
            raise LaunchError(f'dist_params.timeout: found {timeout!r}, expected a positive number of seconds')
        return settings


def _join(placement: Placement, backend: str, timeout: timedelta) -> Ranks:
    address = f'[{placement.master_address}]' if ':' in placement.master_address else placement.master_address
    meeting_point = f'{address}:{placement.master_port}'
    try:
        dist.init_process_group(
            backend,
            init_method=f'tcp://{meeting_point}',
            rank=placement.rank,
            world_size=placement.world_size,
            timeout=timeout,
        )
        group = dist.new_group(backend=dist.Backend.GLOO, timeout=timeout)
    except RuntimeError as error:  # the base of all errors of torch.distributed
        raise LaunchError(
            f'process {placement.rank} of {placement.world_size} cannot join the others at MASTER_ADDR:MASTER_PORT='
            f'{meeting_point}: {error}; check that the node can be reached, that the port is free (another one is set '
            'by dist_params.port or MASTER_PORT), and which network is used (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)'
        ) from error
    sizes = placement.rank, placement.world_size, placement.local_rank, placement.local_world_size
    return Ranks(*sizes, group=group)


def _refuse_shared_devices(ranks: Ranks, device: torch.device) -> None:
    """Find processes with the same GPU; one that sees a single GPU cannot tell from its number."""
    devices = ranks.all_gather(str(torch.cuda.get_device_properties(device).uuid))
    shared = next((other for other in devices if devices.count(other) > 1), None)
    if shared is not None:
        sharing = ', '.join(str(rank) for rank, other in enumerate(devices) if other == shared)
        raise LaunchError(
            f'processes {sharing} have the same GPU ({shared}; CUDA_VISIBLE_DEVICES={_visible()}), expected one for '
            'each; start as many processes per node as it has GPUs, and let every process see its own or all of them'
        )


def _share_cpus(local_world_size: int) -> None:
    """Divide the cores of a node among its processes, unless OMP_NUM_THREADS does."""
    if 'OMP_NUM_THREADS' in os.environ:
        return
    own = os.environ.get('SLURM_CPUS_PER_TASK', '')
    threads = int(own) if own.isdigit() else num_cpus() // local_world_size
    torch.set_num_threads(max(1, threads))


def _visible() -> str:
    return os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')
