"""Sampling a data split with several processes, one batch of each of them at a time.

The batches that all processes make at the same time are a *round*. Networks that are divided among processes are asked
by all of them together, so in every round each process has a batch, and all batches are equally large: where the data
do not suffice, rows are repeated, and what is made of them is thrown away. All items of a round are of one bucket, and
thus of one shape, and follow one another there, so that the main process can put the samples of a round into batches as
one process would have made them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lakonlab.evaluation.samples import SampleBatch
from lakonlab.ranks import Ranks


class Share(NamedTuple):
    """What one process does in a round.

    Args:
        batch: A batch of the data set, of the same size in every process.
        count: How many of its first rows count; the others are repetitions.
    """

    batch: dict
    count: int


def shares(dataloader: DataLoader, ranks: Ranks) -> Iterator[Share]:
    """This process's share of every round; to be iterated by all processes together.

    Args:
        dataloader: This process's loader, made by :func:`lakonlab.evaluation.evaluate.build_evaluation_loader`.
        ranks: The processes.

    Yields:
        As many shares in every process.

    Raises:
        ValueError: The loader was built for other processes, or their data sets differ.
        Exception: What loading a batch raised in any process.
    """
    sampler = dataloader.batch_sampler
    built_for = sampler.rank, sampler.world_size
    if built_for != (ranks.rank, ranks.world_size):
        raise ValueError(
            f'this loader reads the items of process {built_for[0]} of {built_for[1]}, but this is process '
            f'{ranks.rank} of {ranks.world_size}: build it with the same ranks'
        )
    num_rounds = ranks.all_gather(sampler.num_rounds)
    if len(set(num_rounds)) > 1:
        raise ValueError(f'the processes would evaluate in {num_rounds} rounds: their data sets differ')
    iterator, held, bucket_held = None, None, None

    def load(number: int) -> tuple[dict, int]:
        nonlocal iterator, held, bucket_held
        part, (bucket, items) = sampler.part(number), sampler.round(number)
        if part:
            iterator = iter(dataloader) if iterator is None else iterator
            held, bucket_held = next(iterator), bucket
        elif bucket_held != bucket:  # what is thrown away has the shape of what the others make
            held, bucket_held = dataloader.collate_fn([dataloader.dataset[int(items[0])]]), bucket
        return held, len(part)

    for number in range(sampler.num_rounds):
        batch, count = ranks.together(partial(load, number))
        size = max(ranks.all_gather(count))
        yield Share(batch if len(batch['ids']) == size else with_rows(batch, size), count)


def with_rows(batch: Any, size: int) -> Any:
    """A batch with another number of rows: the first ones, or all of them over and over.

    Args:
        batch: What :func:`lakonlab.datasets.collate.collate` returns, with at least one row.
        size: Rows of the result.
    """
    if isinstance(batch, dict):
        return {key: with_rows(value, size) for key, value in batch.items()}
    rows = [row % len(batch) for row in range(size)]
    return batch[rows] if isinstance(batch, Tensor) else [batch[row] for row in rows]


def to_send(samples: SampleBatch, count: int) -> SampleBatch:
    """The samples of a share that count, as tensors of their own on the CPU.

    Args:
        samples: What was made of a share.
        count: How many of its first rows count.

    Returns:
        Copies, which hold no memory of the rows left out.
    """

    def part(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[:count].detach().to('cpu', copy=True)

    seconds, phases = samples.seconds, samples.phases
    kept = count / len(samples.ids)
    return SampleBatch(
        part(samples.images),
        list(samples.ids[:count]),
        part(samples.labels),
        part(samples.reference),
        None if seconds is None else seconds * kept,
        warm_up=samples.warm_up,
        prompts=None if samples.prompts is None else list(samples.prompts[:count]),
        flops=samples.flops,
        noise=None if samples.noise is None else list(samples.noise[:count]),
        phases=None if phases is None else {name: value * kept for name, value in phases.items()},
    )


def in_order(
    parts: Sequence[SampleBatch], size: int, device: torch.device, feed_batch_size: int
) -> Iterator[SampleBatch]:
    """Put the samples of a round into the batches that one process would have made.

    Args:
        parts: What each process made, by rank; others than the first may have made nothing.
        size: Largest batch.
        device: Where images go.
        feed_batch_size: Largest batch given to a feature extractor.

    Yields:
        Batches in the order of the data set. Their ``seconds`` and ``phases`` are sums over their samples, as if one
        process had made one after the other.
    """
    rows = sorted((row, rank) for rank, part in enumerate(parts) for row in range(len(part.ids)))
    for start in range(0, len(rows), size):
        chosen = rows[start : start + size]
        timed = all(part.seconds is not None for part in parts if part.ids)
        measured = [part.phases or {} for part in parts if part.ids]
        phases = [name for name in measured[0] if all(name in other for other in measured)]
        reference = _take(parts, 'reference', chosen)
        yield SampleBatch(
            _take(parts, 'images', chosen).to(device),
            [parts[rank].ids[row] for row, rank in chosen],
            _take(parts, 'labels', chosen),
            None if reference is None else reference.to(device),
            sum(parts[rank].seconds / len(parts[rank].ids) for _, rank in chosen) if timed else None,
            feed_batch_size,
            parts[0].warm_up,
            None if parts[0].prompts is None else [parts[rank].prompts[row] for row, rank in chosen],
            parts[0].flops,
            [None if parts[rank].noise is None else parts[rank].noise[row] for row, rank in chosen],
            {name: sum(parts[rank].phases[name] / len(parts[rank].ids) for _, rank in chosen) for name in phases},
        )


def _take(parts: Sequence[SampleBatch], name: str, chosen: Sequence[tuple[int, int]]) -> Tensor | None:
    if getattr(parts[0], name) is None:
        return None
    return torch.stack([getattr(parts[rank], name)[row] for row, rank in chosen])
