"""Data sets made of others: one after the other, or a part of one."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from lakonlab.datasets.collate import items_of
from lakonlab.ops.random_source import RandomSource
from lakonlab.registry import DATASETS


@DATASETS.register_module()
class ConcatDataset(Dataset):
    """The items of several data sets, one set after the other.

    Args:
        datasets: Configs of the data sets, or the data sets themselves; at least one.

    The number of an item counts through all of them, and is its ``ids``. Where they have buckets, no bucket of one is a
    bucket of another.

    Raises:
        ValueError: There is no data set, or only some of them have buckets.
    """

    def __init__(self, datasets: Sequence[Mapping[str, Any] | Dataset]):
        if not datasets:
            raise ValueError('datasets=[]: expected at least one data set')
        self.datasets = [built(dataset) for dataset in datasets]
        self._ends: list[int] | None = None

    @property
    def ends(self) -> list[int]:
        """Number after the last item of every data set; their lengths are asked for when first needed."""
        if self._ends is None:
            self._ends = [int(end) for end in np.cumsum([len(dataset) for dataset in self.datasets])]
        return self._ends

    @property
    def bucket_ids(self) -> np.ndarray | None:
        """Bucket of every item; None if no data set has buckets."""
        found = [getattr(dataset, 'bucket_ids', None) for dataset in self.datasets]
        without = [str(number) for number, ids in enumerate(found) if ids is None]
        if len(without) == len(found):
            return None
        if without:
            raise ValueError(
                f'datasets: {", ".join(without)} of {len(found)} (counted from 0) have no buckets and the others have: '
                'set bucketize alike in all of them'
            )
        offset, parts = 0, []
        for ids in found:
            ids = np.asarray(ids, dtype=np.int64)
            parts.append(ids + offset)
            offset += int(ids.max()) + 1 if len(ids) else 0
        return np.concatenate(parts)

    @property
    def needs_text_encoder(self) -> str | None:
        """Why the model must have a text encoder, as the first data set that needs one says; None if none does."""
        reasons = [getattr(dataset, 'needs_text_encoder', None) for dataset in self.datasets]
        return next((reason for reason in reasons if reason is not None), None)

    @property
    def has_images(self) -> bool:
        """Whether a trainer on data could use every data set."""
        return all(getattr(dataset, 'has_images', True) for dataset in self.datasets)

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> dict:
        """The item of the data set it falls into, with its number here as ``ids``.

        Raises:
            IndexError: ``index`` is out of range.
        """
        dataset, number = self._place_of(index)
        return {**dataset[number], 'ids': index}

    def __getitems__(self, indices: Sequence[int]) -> list[dict] | dict:
        """The items of a batch, those of each data set read as it reads several; a whole batch, if it makes one."""
        places: dict[int, list[int]] = {}  # which rows of the batch a data set gives
        for row, index in enumerate(indices):
            places.setdefault(id(self._place_of(index)[0]), []).append(row)
        items: list[dict] = [{}] * len(indices)
        for rows in places.values():
            dataset = self._place_of(indices[rows[0]])[0]
            found = read_several(dataset, [self._place_of(indices[row])[1] for row in rows])
            if len(rows) == len(indices) and isinstance(found, Mapping):
                return {**found, 'ids': list(indices)}
            for row, item in zip(rows, items_of(found), strict=True):
                items[row] = {**item, 'ids': indices[row]}
        return items

    def _place_of(self, index: int) -> tuple[Dataset, int]:
        if not 0 <= index < len(self):
            raise IndexError(f'item {index} of a ConcatDataset of {len(self)}')
        number = bisect.bisect_right(self.ends, index)
        return self.datasets[number], index - (self.ends[number - 1] if number else 0)

    @property
    def random_item(self) -> Callable[[int, RandomSource], dict]:
        """How a loader reads an item with random numbers, where a data set has such items."""
        if not any(hasattr(dataset, 'random_item') for dataset in self.datasets):
            raise AttributeError('no data set has random items')
        return self._random_item

    def _random_item(self, index: int, source: RandomSource) -> dict:
        dataset, number = self._place_of(index)
        return {**item_of(dataset, number, source), 'ids': index}


@DATASETS.register_module()
class Subset(Dataset):
    """Some items of a data set, with the ``ids`` that they have there.

    Args:
        dataset: Config of the data set, or the data set itself.
        indices: Numbers of the items, in the order in which they are wanted.

    Raises:
        ValueError: The data set has no item of such a number; said when the length or an item is asked for.
    """

    def __init__(self, dataset: Mapping[str, Any] | Dataset, indices: Sequence[int]):
        self.dataset = built(dataset)
        self.indices = np.asarray(indices, dtype=np.int64)
        self._is_checked = False

    def _checked(self) -> np.ndarray:
        if not self._is_checked:
            size = len(self.dataset)
            wrong = self.indices[(self.indices < 0) | (self.indices >= size)]
            if len(wrong):
                raise ValueError(f'indices: found {int(wrong[0])}, expected numbers from 0 to {size - 1}')
            self._is_checked = True
        return self.indices

    @property
    def bucket_ids(self) -> np.ndarray | None:
        """Bucket of every item, by the numbers of the whole data set; None if it has no buckets."""
        ids = getattr(self.dataset, 'bucket_ids', None)
        return None if ids is None else np.asarray(ids, dtype=np.int64)[self._checked()]

    @property
    def needs_text_encoder(self) -> str | None:
        """Why the model must have a text encoder; None if it need not."""
        return getattr(self.dataset, 'needs_text_encoder', None)

    @property
    def has_images(self) -> bool:
        """Whether a trainer on data could use it."""
        return getattr(self.dataset, 'has_images', True)

    def __len__(self) -> int:
        return len(self._checked())

    def __getitem__(self, index: int) -> dict:
        """The item of the whole data set.

        Raises:
            IndexError: ``index`` is out of range.
        """
        return self.dataset[self._number_of(index)]

    def __getitems__(self, indices: Sequence[int]) -> Any:
        """The items of a batch, read as the whole data set reads them."""
        return read_several(self.dataset, [self._number_of(index) for index in indices])

    def _number_of(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f'item {index} of a Subset of {len(self)}')
        return int(self.indices[index])

    @property
    def random_item(self) -> Callable[[int, RandomSource], dict]:
        """How a loader reads an item with random numbers, where the whole data set has such items."""
        if not hasattr(self.dataset, 'random_item'):
            raise AttributeError('the data set has no random items')
        return self._random_item

    def _random_item(self, index: int, source: RandomSource) -> dict:
        return item_of(self.dataset, self._number_of(index), source)


def item_of(dataset: Dataset, index: int, source: RandomSource) -> dict:
    """An item, with random numbers from a source where the data set takes some."""
    read = getattr(dataset, 'random_item', None)
    return dataset[index] if read is None else read(index, source)


def read_several(dataset: Dataset, indices: Sequence[int]) -> Any:
    """Items, or the batch that they make, as a loader would read them."""
    read = getattr(dataset, '__getitems__', None)
    return [dataset[index] for index in indices] if read is None else read(indices)


def built(dataset: Mapping[str, Any] | Dataset) -> Dataset:
    """A data set, built if it is a config."""
    return DATASETS.build(dict(dataset)) if isinstance(dataset, Mapping) else dataset
