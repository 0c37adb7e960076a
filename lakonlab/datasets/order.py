"""The order in which a run reads its data, as a function of seed and position alone.

Items are read in *buckets*: items of one bucket have one shape, and a global batch holds items of one bucket only. A
data set without buckets is one bucket.

The items of a bucket of ``n`` form a stream that never ends: position ``p`` belongs to pass ``p // n`` and holds item
``permutation(seed, pass)[p % n]`` of the bucket. The k-th batch of a bucket takes positions ``k * B`` to
``(k + 1) * B`` of its stream, for a global batch of B. So a batch may straddle two passes or, where a bucket is smaller
than a batch, several; none is dropped or padded. Epoch ``e`` of the run holds, shuffled, the batches that begin in pass
``e`` of their bucket.

That makes ``ceil(e * n / B)`` batches of a bucket in the first ``e`` epochs: every item has then been read ``e`` times,
or more often, where a batch took it in advance. All items of a bucket together are never more than ``B - 1`` reads
ahead, however long the run, so in the long run all are read equally often. With one bucket, iteration ``i`` is batch
``i``.

Nothing here is replayed: the batch of any iteration is found directly. What is kept, permutations of the present passes
and the sequence of buckets in the present epoch, only saves time.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np


def permutation(size: int, seed: int, epoch: int, stream: str = '') -> np.ndarray:
    """The order of one epoch.

    Sorts random words of a counter-based generator, whose stream numpy guarantees across versions, unlike that of
    ``Generator.permutation``.

    Args:
        size: Number of items N, at least 1.
        seed: Seed of the run.
        epoch: Number of the epoch, from 0.
        stream: What is permuted, where a run permutes several things.

    Returns:
        A permutation of 0..N-1, shape (N,), int64.
    """
    name = f'data order:{seed}:{epoch}' + (f':{stream}' if stream else '')
    digest = hashlib.blake2b(name.encode(), digest_size=16).digest()
    words = np.random.Philox(key=np.frombuffer(digest, dtype='<u8')).random_raw(size)
    return np.argsort(words, kind='stable')


def members(bucket_ids: Sequence, size: int) -> list[np.ndarray]:
    """The items of each bucket.

    Args:
        bucket_ids: One number or name per item.
        size: Number of items of the data set.

    Returns:
        Arrays of increasing item numbers, int64, by increasing id of their bucket.

    Raises:
        ValueError: There is not one id per item.
    """
    if size == 0:
        return []
    ids = np.asarray(bucket_ids)
    if ids.shape != (size,) or ids.dtype.kind not in 'iubUS':
        raise ValueError(
            f'bucket_ids of the data set: expected one number or name for each of {size} items, found an array of '
            f'shape {ids.shape} and type {ids.dtype}'
        )
    _, bucket_of, counts = np.unique(ids, return_inverse=True, return_counts=True)
    return np.split(np.argsort(bucket_of, kind='stable'), np.cumsum(counts)[:-1])


class Reads(NamedTuple):
    """What one process reads in an iteration.

    Args:
        items: Item numbers, int64.
        passes: How often the run has read each of them before, int64.
    """

    items: np.ndarray
    passes: np.ndarray


class DataOrder:
    """Which items every iteration of a run reads.

    Args:
        size: Number of items of the data set, at least 1.
        batch_size: Global batch B, at least 1.
        shuffle: If False, items of a bucket are in the order of the data set, as are batches by their first items.
        seed: Seed of the run.
        bucket_ids: One number or name per item, the same for items that may be in one batch; None if all may.

    Raises:
        ValueError: An empty data set, a batch size below 1, or ``bucket_ids`` of another length.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        bucket_ids: Sequence | None = None,
    ):
        if size < 1:
            raise ValueError('the training data set is empty')
        if batch_size < 1:
            raise ValueError(f'the global batch is {batch_size}: expected at least 1')
        self.size, self.batch_size, self.shuffle, self.seed = size, batch_size, shuffle, seed
        buckets = None if bucket_ids is None else members(bucket_ids, size)
        self._members = None if buckets is None or len(buckets) == 1 else buckets
        self._sizes = np.array([size] if self._members is None else [len(items) for items in self._members])
        self._orders: dict[int, tuple[int, np.ndarray]] = {}
        self._table: tuple[int, np.ndarray, np.ndarray] | None = None

    @property
    def bucket_sizes(self) -> list[int]:
        """Number of items of each bucket."""
        return self._sizes.tolist()

    @cached_property
    def buckets(self) -> str:
        """Which items share a bucket, as a digest; ``'one'`` if all do."""
        if self._members is None:
            return 'one'
        digest = hashlib.blake2b(digest_size=8)
        for items in self._members:
            digest.update(len(items).to_bytes(8, 'little') + items.astype('<i8').tobytes())
        return digest.hexdigest()

    def epoch(self, iteration: int) -> int:
        """The epoch to which the batch of an iteration belongs.

        Args:
            iteration: Number of the iteration, from 0.

        Returns:
            Number of the epoch, from 0: the pass through its bucket in which the batch begins.
        """
        latest = iteration * self.batch_size // self.size
        if self._members is None:
            return latest
        # each bucket is less than a batch ahead of its share
        earliest = max(0, (iteration - len(self._members)) * self.batch_size // self.size)
        candidates = range(earliest, latest + 1)
        return earliest + bisect_right(candidates, iteration, key=lambda epoch: int(self._made(epoch).sum())) - 1

    def reads(self, iteration: int, start: int = 0, stop: int | None = None) -> Reads:
        """Rows ``start`` to ``stop`` of the global batch of an iteration.

        Args:
            iteration: Number of the iteration, from 0.
            start: First row, ``0 <= start < B``.
            stop: One after the last row; None for B.
        """
        bucket, number = self._batch(iteration)
        size = int(self._sizes[bucket])
        first = number * self.batch_size
        positions = np.arange(first + start, first + (self.batch_size if stop is None else stop))
        passes, within = np.divmod(positions, size)
        if self.shuffle:
            for present in range(int(passes[0]), int(passes[-1]) + 1):
                rows = passes == present
                within[rows] = self._order(bucket, present)[within[rows]]
        return Reads(within if self._members is None else self._members[bucket][within], passes)

    def _made(self, epoch: int) -> np.ndarray:
        """How many batches of each bucket precede an epoch."""
        return -(-epoch * self._sizes // self.batch_size)

    def _batch(self, iteration: int) -> tuple[int, int]:
        """The bucket of an iteration, and the number of its batch among those of the bucket."""
        if self._members is None:
            return 0, iteration
        epoch = self.epoch(iteration)
        if self._table is None or self._table[0] != epoch:
            self._table = (epoch, *self._epoch_table(epoch))
        _, buckets, numbers = self._table
        row = iteration - int(self._made(epoch).sum())
        return int(buckets[row]), int(numbers[row])

    def _epoch_table(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Bucket and number within the bucket of every batch of an epoch."""
        before = self._made(epoch)
        counts = self._made(epoch + 1) - before
        buckets = np.repeat(np.arange(len(counts)), counts)
        numbers = np.concatenate([np.arange(start, start + count) for start, count in zip(before, counts)])
        if self.shuffle:
            buckets = buckets[permutation(len(buckets), self.seed, epoch, 'batches')]
            rows = np.argsort(buckets, kind='stable')
            shuffled = np.empty_like(numbers)
            shuffled[rows] = numbers
            return buckets, shuffled
        first_rows = numbers * self.batch_size % self._sizes[buckets]
        first_items = np.array([self._members[bucket][row] for bucket, row in zip(buckets, first_rows)])
        rows = np.argsort(first_items, kind='stable')
        return buckets[rows], numbers[rows]

    def _order(self, bucket: int, number: int) -> np.ndarray:
        """The permutation of one pass through a bucket."""
        known = self._orders.get(bucket)
        if known is None or known[0] != number:
            stream = '' if self._members is None else f'bucket {bucket}'
            known = (number, permutation(int(self._sizes[bucket]), self.seed, number, stream))
            self._orders[bucket] = known
        return known[1]


def data_order(dataset, batch_size: int, *, shuffle: bool = True, seed: int = 0) -> DataOrder:
    """The order in which a run reads a data set.

    Args:
        dataset: Has a length; its ``bucket_ids``, if it has them and they are not None, name the bucket of each item.
            Items that are independent draws (``independent_items = True``) are read in order: a permutation of them
            would be the same data at the price of an array as long as the data set.
        batch_size: Global batch.
        shuffle: Permute every epoch.
        seed: Seed of the run.
    """
    return DataOrder(
        len(dataset),
        batch_size,
        shuffle=shuffle and not getattr(dataset, 'independent_items', False),
        seed=seed,
        bucket_ids=getattr(dataset, 'bucket_ids', None),
    )
