"""The order in which a run reads its data, as a function of seed and position alone.

A training run reads a stream that never ends. Position ``p`` of the stream belongs to epoch ``p // N`` of a data set of
N items and holds item ``permutation(seed, epoch)[p % N]``. Iteration ``i`` takes positions ``i * B`` to ``(i + 1) * B``
for a global batch of B, and each rank a contiguous part of them. So a batch may straddle two epochs, none is dropped
or padded, and resuming at any iteration costs nothing and gives the batches the run would have seen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


def permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    """The order of one epoch.

    Sorts random words of a counter-based generator, whose stream numpy guarantees across versions, unlike that of
    ``Generator.permutation``.

    Args:
        size: Number of items N, at least 1.
        seed: Seed of the run.
        epoch: Number of the epoch, from 0.

    Returns:
        A permutation of 0..N-1, shape (N,), int64.
    """
    digest = hashlib.blake2b(f'data order:{seed}:{epoch}'.encode(), digest_size=16).digest()
    words = np.random.Philox(key=np.frombuffer(digest, dtype='<u8')).random_raw(size)
    return np.argsort(words, kind='stable')


class StreamBatchSampler(Sampler[list[int]]):
    """One rank's share of every batch of an endless stream, from a given iteration on.

    Args:
        size: Number of items of the data set, at least 1.
        samples_per_gpu: Batch size of one rank.
        shuffle: If False, every epoch is in the order of the data set.
        seed: Seed of the run.
        start_iter: Iteration of the first batch that iterating yields.
        rank: This process, ``0 <= rank < world_size``.
        world_size: Number of processes; the global batch is ``samples_per_gpu * world_size``.

    Raises:
        ValueError: An empty data set or a batch size below 1.
    """

    def __init__(
        self,
        size: int,
        samples_per_gpu: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        start_iter: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        if size < 1:
            raise ValueError('the training data set is empty')
        if samples_per_gpu < 1:
            raise ValueError(f'samples_per_gpu={samples_per_gpu}: expected at least 1')
        self.size = size
        self.samples_per_gpu = samples_per_gpu
        self.shuffle = shuffle
        self.seed = seed
        self.start_iter = start_iter
        self.rank = rank
        self.world_size = world_size
        self._order_of_epoch: tuple[int, np.ndarray] | None = None

    def _order(self, epoch: int) -> np.ndarray:
        if self._order_of_epoch is None or self._order_of_epoch[0] != epoch:
            self._order_of_epoch = (epoch, permutation(self.size, self.seed, epoch))
        return self._order_of_epoch[1]

    def batch(self, iteration: int) -> list[int]:
        """The items this rank reads in one iteration.

        Args:
            iteration: Number of the iteration, from 0.

        Returns:
            ``samples_per_gpu`` item numbers.
        """
        start = (iteration * self.world_size + self.rank) * self.samples_per_gpu
        positions = range(start, start + self.samples_per_gpu)
        if not self.shuffle:
            return [position % self.size for position in positions]
        return [int(self._order(position // self.size)[position % self.size]) for position in positions]

    def epoch(self, iteration: int) -> int:
        """The epoch to which the first position of an iteration's global batch belongs.

        Args:
            iteration: Number of the iteration, from 0.

        Returns:
            Number of the epoch, from 0.
        """
        return iteration * self.samples_per_gpu * self.world_size // self.size

    def __iter__(self) -> Iterator[list[int]]:
        iteration = self.start_iter
        while True:
            yield self.batch(iteration)
            iteration += 1


class EvaluationBatchSampler(Sampler[list[int]]):
    """Every item once, in order, dealt to the ranks in turn; no padding, so the last batches may be uneven.

    Args:
        size: Number of items of the data set.
        samples_per_gpu: Largest batch of one rank.
        rank: This process, ``0 <= rank < world_size``.
        world_size: Number of processes.

    Raises:
        ValueError: A batch size below 1.
    """

    def __init__(self, size: int, samples_per_gpu: int, *, rank: int = 0, world_size: int = 1):
        if samples_per_gpu < 1:
            raise ValueError(f'samples_per_gpu={samples_per_gpu}: expected at least 1')
        self.indices = range(rank, size, world_size)
        self.rank = rank
        self.world_size = world_size
        self.samples_per_gpu = samples_per_gpu

    def __len__(self) -> int:
        return -(-len(self.indices) // self.samples_per_gpu)

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, len(self.indices), self.samples_per_gpu):
            yield list(self.indices[start : start + self.samples_per_gpu])
