"""Loaders for training and evaluation."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

from torch.utils.data import DataLoader, Dataset

from lakonlab.datasets.collate import collate
from lakonlab.datasets.sampler import EvaluationBatchSampler, StreamBatchSampler


def _apart_from_signals(own: Callable[[int], None] | None, worker: int) -> None:
    """Let a worker outlive a signal to the process group of its run, which then saves and ends its workers itself."""
    os.setpgid(0, 0)
    if own is not None:
        own(worker)


def build_dataloader(
    dataset: Dataset,
    samples_per_gpu: int,
    workers_per_gpu: int = 0,
    *,
    shuffle: bool = False,
    infinite: bool | None = None,
    seed: int = 0,
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
    of workers nor on what was loaded before.

    Args:
        dataset: Data set of known length; its items are mappings.
        samples_per_gpu: Batch size of this process.
        workers_per_gpu: Worker processes; 0 loads in this process.
        shuffle: Permute every epoch; only for endless loaders. Items that are independent draws (a data set with
            ``independent_items = True``) are read in order all the same.
        infinite: Whether the loader never ends; None for the value of ``shuffle``.
        seed: Seed of the data order.
        start_iter: Iteration of the first batch of an endless loader.
        rank: This process, ``0 <= rank < world_size``.
        world_size: Number of processes that share the data.
        persistent_workers: Keep workers between passes; without workers it has no effect.
        prefetch_factor: Batches that each worker loads ahead; without workers it has no effect.
        **kwargs: Other arguments of ``torch.utils.data.DataLoader``.

    Returns:
        The loader; its ``batch_sampler`` tells which items an iteration reads.

    Raises:
        ValueError: ``shuffle`` was asked of a loader that ends, or the batch size is below 1.
    """
    infinite = shuffle if infinite is None else infinite
    if infinite:
        batch_sampler = StreamBatchSampler(
            len(dataset),
            samples_per_gpu,
            # a permutation of the items would be the same data at the price of an array as long as the data set
            shuffle=shuffle and not getattr(dataset, 'independent_items', False),
            seed=seed,
            start_iter=start_iter,
            rank=rank,
            world_size=world_size,
        )
    elif shuffle:
        raise ValueError('shuffle=True needs infinite=True: a pass for evaluation is always in order')
    else:
        batch_sampler = EvaluationBatchSampler(len(dataset), samples_per_gpu, rank=rank, world_size=world_size)
    if workers_per_gpu > 0:
        own = kwargs.pop('worker_init_fn', None)
        kwargs.update(
            persistent_workers=persistent_workers,
            prefetch_factor=prefetch_factor,
            worker_init_fn=partial(_apart_from_signals, own),
        )
    kwargs.setdefault('collate_fn', collate)
    return DataLoader(dataset, batch_sampler=batch_sampler, num_workers=workers_per_gpu, **kwargs)
