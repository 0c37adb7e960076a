"""Items that are drawn anew each time they are read, without anybody keeping a state of random numbers.

A data set with random items (crops, flips, noise) has a method ``random_item(index, source)``, which takes every random
number from the source. The loader gives it one that is a function of the seed of the run, the item, and how often the
run has read the item before. So an item differs from epoch to epoch, but depends on no worker, no process and no
interruption.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from torch.utils.data import Dataset

from lakonlab.ops.random_source import SeededSource


def item_source(seed: int, index: int, number: int) -> SeededSource:
    """Where the random numbers of one reading of an item come from; draws have one row.

    Args:
        seed: Seed of the run.
        index: Number of the item.
        number: How often the run has read the item before.
    """
    # apart from the numbers of training steps, which are drawn with the seed itself
    digest = hashlib.blake2b(f'items:{seed}'.encode(), digest_size=8).digest()
    return SeededSource(int.from_bytes(digest, 'little'), number, row_ids=[index])


class RandomItems(Dataset):
    """A data set with random items, as a loader reads it.

    Args:
        dataset: Has ``random_item(index, source)``.
        seed: Seed of the run.
    """

    def __init__(self, dataset: Any, seed: int):
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, read: int | tuple[int, int]) -> Any:
        """One item.

        Args:
            read: Number of the item, and how often it was read before; the number alone stands for the first time.
        """
        index, number = read if isinstance(read, tuple) else (read, 0)
        return self.dataset.random_item(index, item_source(self.seed, index, number))

    def __getitems__(self, reads: Sequence[int | tuple[int, int]]) -> Any:
        """The items of a batch, read together by ``random_items(indices, sources)`` where the data set has that."""
        together = getattr(self.dataset, 'random_items', None)
        if together is None:
            return [self[read] for read in reads]
        pairs = [read if isinstance(read, tuple) else (read, 0) for read in reads]
        return together([index for index, _ in pairs], [item_source(self.seed, *pair) for pair in pairs])
