"""Items of a data set to a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch


def collate(items: Sequence | Mapping):
    """Put items into one batch: tensors are stacked, mappings are followed, all else becomes a list.

    Python numbers and strings are descriptions (ids, names), so they stay lists; what the model computes with comes
    from the data set as tensors.

    Args:
        items: Items of one kind: mappings with the same keys, tensors of one shape, or anything else. A mapping is the
            batch itself, of a data set that reads the items of a batch together.

    Returns:
        The batch: tensors of shape (B, ...), dicts of batches, lists of length B.

    Raises:
        KeyError: A key of the first item is missing in another one.
        ValueError: Tensors of different shapes stand under one key.
    """
    if isinstance(items, Mapping):
        return dict(items)
    first = items[0]
    if isinstance(first, Mapping):
        batch = {}
        for key in first:
            if any(key not in item for item in items):
                raise KeyError(f'{key!r} is in the first item of a batch but not in all of them')
            try:
                batch[key] = collate([item[key] for item in items])
            except ValueError as error:
                raise ValueError(f'{key!r}: {error}') from None
        return batch
    if isinstance(first, torch.Tensor):
        shapes = {tuple(item.shape) for item in items}
        if len(shapes) > 1:
            raise ValueError(f'cannot stack tensors of shapes {sorted(shapes)} into one batch')
        return torch.stack(list(items))
    return list(items)
