"""What each process reads: its part of every batch in training, its share of the items in evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from lakonlab.datasets.order import DataOrder, Reads, members


class StreamBatchSampler(Sampler[list]):
    """One rank's share of every batch of an endless stream, from a given iteration on.

    Ranks take contiguous parts of the global batch, so what a global batch holds does not depend on their number.

    Args:
        order: What every global batch holds.
        start_iter: Iteration of the first batch that iterating yields.
        rank: This process, ``0 <= rank < world_size``.
        world_size: Number of processes that divide a global batch among them.
        with_passes: Yield pairs ``(item, pass)`` instead of items, where ``pass`` counts how often the run has read the
            item before.

    Raises:
        ValueError: The global batch cannot be divided among the processes.
    """

    def __init__(
        self,
        order: DataOrder,
        *,
        start_iter: int = 0,
        rank: int = 0,
        world_size: int = 1,
        with_passes: bool = False,
    ):
        if order.batch_size % world_size:
            raise ValueError(f'a global batch of {order.batch_size} cannot be divided among {world_size} processes')
        self.order = order
        self.samples_per_gpu = order.batch_size // world_size
        self.start_iter = start_iter
        self.rank = rank
        self.world_size = world_size
        self.with_passes = with_passes

    def reads(self, iteration: int) -> Reads:
        """What this rank reads in one iteration: ``samples_per_gpu`` items.

        Args:
            iteration: Number of the iteration, from 0.
        """
        start = self.rank * self.samples_per_gpu
        return self.order.reads(iteration, start, start + self.samples_per_gpu)

    def batch(self, iteration: int) -> list[int]:
        """The numbers of these items."""
        return self.reads(iteration).items.tolist()

    def __iter__(self) -> Iterator[list]:
        for iteration in count(self.start_iter):
            items, passes = (column.tolist() for column in self.reads(iteration))
            yield list(zip(items, passes)) if self.with_passes else items


class Round(NamedTuple):
    """What all processes read at the same time in an evaluation.

    Args:
        bucket: Number of the bucket that all items are of.
        items: Item numbers of all processes, in order.
    """

    bucket: int
    items: Sequence[int]


class EvaluationBatchSampler(Sampler[list[int]]):
    """Every item once, in order, dealt to the ranks in turn; no padding, so the last batches may be uneven.

    Buckets come one after another, and no round holds items of two.

    Args:
        size: Number of items of the data set.
        samples_per_gpu: Largest batch of one rank.
        rank: This process, ``0 <= rank < world_size``.
        world_size: Number of processes.
        bucket_ids: One number or name per item, the same for items that may be in one batch; None if all may.

    Raises:
        ValueError: A batch size below 1, or ``bucket_ids`` of another length.
    """

    def __init__(
        self,
        size: int,
        samples_per_gpu: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        bucket_ids: Sequence | None = None,
    ):
        if samples_per_gpu < 1:
            raise ValueError(f'samples_per_gpu={samples_per_gpu}: expected at least 1')
        self.rank = rank
        self.world_size = world_size
        self.samples_per_gpu = samples_per_gpu
        self._buckets: list[Sequence[int]] = [range(size)] if bucket_ids is None else _by_first(bucket_ids, size)
        per_round = samples_per_gpu * world_size
        rounds = [-(-len(items) // per_round) for items in self._buckets]
        self._starts = np.concatenate([[0], np.cumsum(rounds, dtype=np.int64)])

    @property
    def num_rounds(self) -> int:
        """Rounds of all processes together."""
        return int(self._starts[-1])

    def round(self, number: int) -> Round:
        """What all processes read in one round.

        Args:
            number: ``0 <= number < num_rounds``.
        """
        bucket = int(np.searchsorted(self._starts, number, side='right')) - 1
        per_round = self.samples_per_gpu * self.world_size
        start = (number - int(self._starts[bucket])) * per_round
        return Round(bucket, self._buckets[bucket][start : start + per_round])

    def part(self, number: int) -> list[int]:
        """What this rank reads in one round; nothing, where the items do not suffice for all ranks."""
        return [int(item) for item in self.round(number).items[self.rank :: self.world_size]]

    def __len__(self) -> int:
        # a rank is without items only in the last round of a bucket
        per_round = self.samples_per_gpu * self.world_size
        idle = sum(0 < len(items) % per_round <= self.rank for items in self._buckets)
        return self.num_rounds - idle

    def __iter__(self) -> Iterator[list[int]]:
        for number in range(self.num_rounds):
            part = self.part(number)
            if part:
                yield part


def _by_first(bucket_ids: Sequence, size: int) -> list[Sequence[int]]:
    """The items of each bucket, by the first of them."""
    return sorted(members(bucket_ids, size), key=lambda items: int(items[0]))
