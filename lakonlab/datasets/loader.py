"""Loaders for training and evaluation."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from functools import partial
from typing import Any

from torch.utils.data import DataLoader, Dataset

from lakonlab.datasets.collate import collate
from lakonlab.datasets.order import data_order
from lakonlab.datasets.random_items import RandomItems
from lakonlab.datasets.sampler import EvaluationBatchSampler, StreamBatchSampler
from lakonlab.held_signals import allow_signals, signals_held, start_resource_tracker

ONLY_WITH_WORKERS = ('persistent_workers', 'prefetch_factor', 'multiprocessing_context', 'timeout', 'worker_init_fn')
FIXED_OPTIONS: dict[str, tuple[Any, str]] = {
    'num_gpus': (1, 'a loader serves one process, and a process has one GPU'),
    'sampler': (None, 'the order is a function of the seed'),
    'batch_sampler': (None, 'the order is a function of the seed'),
    'drop_last': (False, 'training never ends, and evaluation reads every item'),
    'in_order': (True, 'a run reads batches in the order of its iterations'),
}
"""Options that may say only what is the case anyway: name -> (value, why)."""
OTHER_NAMES = {'batch_size': 'samples_per_gpu', 'num_workers': 'workers_per_gpu'}
OPEN_FILES = 65536
"""Files that a process with workers may hold open, where the system lets it."""


def _apart_from_signals(own: Callable[[int], None] | None, worker: int) -> None:
    """Let a worker outlive a signal to the process group of its run, which then saves and ends its workers itself."""
    os.setpgid(0, 0)
    allow_signals()
    if own is not None:
        own(worker)


class _Loader(DataLoader):
    """A loader whose workers, and the server that may fork them, do not end by a signal to all processes of a run.

    Workers get signals once they have left the process group of the run; the server never, and ends with the run.
    """

    def __iter__(self):
        if self.num_workers:
            start_resource_tracker()
        with signals_held():
            return super().__iter__()


def _allow_open_files() -> None:
    """Raise this process's limit of open files: every tensor that a worker loads ahead is one."""
    try:
        import resource
    except ImportError:  # no such limit on this system
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _checked_options(options: dict[str, Any], world_size: int) -> dict[str, Any]:
    """The options that ``DataLoader`` is to be given, of those that a caller or a config gave."""
    options = dict(options)
    if options.pop('dist', None) is False and world_size > 1:
        raise ValueError(f'dist=False: this loader shares the data with {world_size} processes; leave dist out')
    for name, (value, reason) in FIXED_OPTIONS.items():
        if name in options and options[name] != value:
            raise ValueError(f'{name}={options[name]!r}: only {value!r} is possible, because {reason}; leave it out')
        options.pop(name, None)
    for name, ours in OTHER_NAMES.items():
        if name in options:
            raise ValueError(f'{name}={options[name]!r}: it is called {ours} here')
    known = set(inspect.signature(DataLoader.__init__).parameters) - {'self', 'dataset', 'shuffle'}
    for name, value in options.items():
        if name not in known:
            allowed = ', '.join(sorted(known - set(FIXED_OPTIONS) - set(OTHER_NAMES)))
            raise ValueError(f'{name}={value!r} is no option of a loader; there are {allowed}')
    return options


def build_dataloader(
    dataset: Dataset,
    samples_per_gpu: int,
    workers_per_gpu: int = 0,
    *,
    shuffle: bool = False,
    infinite: bool | None = None,
    seed: int | None = 0,
    start_iter: int = 0,
    rank: int = 0,
    world_size: int = 1,
    persistent_workers: bool = False,
    prefetch_factor: int | None = None,
    **kwargs,
) -> DataLoader:
    """Build the loader of one process.

    A training loader never ends: iterating it yields the batch of iteration ``start_iter``, then the next ones. An
    evaluation loader yields every item once over all processes. Which items a batch holds depends neither on the number
    of workers nor on what was loaded before. Where the data set has ``bucket_ids``, the batches that all processes read
    at the same time are of one bucket. Nothing is loaded before the loader is iterated, and nothing that is not asked
    for by going on.

    Args:
        dataset: Data set of known length; its items are mappings.
        samples_per_gpu: Batch size of this process.
        workers_per_gpu: Worker processes; 0 loads in this process.
        shuffle: Permute every epoch; only for endless loaders. Items that are independent draws (a data set with
            ``independent_items = True``) are read in order all the same.
        infinite: Whether the loader never ends; None for the value of ``shuffle``.
        seed: Seed of the data order, and of random items; None for 0.
        start_iter: Iteration of the first batch of an endless loader.
        rank: This process, ``0 <= rank < world_size``.
        world_size: Number of processes that share the data.
        persistent_workers: Keep workers between passes; without workers it has no effect.
        prefetch_factor: Batches that each worker loads ahead; without workers it has no effect.
        **kwargs: Other arguments of ``torch.utils.data.DataLoader``; those that concern workers have no effect without
            workers. ``num_gpus``, ``dist``, ``sampler`` and ``drop_last`` may say only what is the case anyway.

    Returns:
        The loader; its ``batch_sampler`` tells which items an iteration reads.

    Raises:
        ValueError: ``shuffle`` was asked of a loader that ends, the batch size is below 1, or an option is unknown or
            cannot be had.
    """
    infinite = shuffle if infinite is None else infinite
    seed = 0 if seed is None else seed
    options = _checked_options(
        {'persistent_workers': persistent_workers, 'prefetch_factor': prefetch_factor, **kwargs}, world_size
    )
    has_random_items = hasattr(dataset, 'random_item')
    if samples_per_gpu < 1:
        raise ValueError(f'samples_per_gpu={samples_per_gpu}: expected at least 1')
    if infinite:
        batch_sampler = StreamBatchSampler(
            data_order(dataset, samples_per_gpu * world_size, shuffle=shuffle, seed=seed),
            start_iter=start_iter,
            rank=rank,
            world_size=world_size,
            with_passes=has_random_items,
        )
    elif shuffle:
        raise ValueError('shuffle=True needs infinite=True: a pass for evaluation is always in order')
    else:
        bucket_ids = getattr(dataset, 'bucket_ids', None)
        batch_sampler = EvaluationBatchSampler(
            len(dataset), samples_per_gpu, rank=rank, world_size=world_size, bucket_ids=bucket_ids
        )
    if workers_per_gpu > 0:
        _allow_open_files()
        options['worker_init_fn'] = partial(_apart_from_signals, options.get('worker_init_fn'))
    else:
        options = {name: value for name, value in options.items() if name not in ONLY_WITH_WORKERS}
    options.setdefault('collate_fn', collate)
    if has_random_items:
        dataset = RandomItems(dataset, seed)
    return _Loader(dataset, batch_sampler=batch_sampler, num_workers=workers_per_gpu, **options)
