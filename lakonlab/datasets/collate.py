"""Items of a data set to a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention

MASK_SUFFIX = '_mask'


def collate(items: Sequence | Mapping):
    """Put items into one batch: tensors are stacked, mappings are followed, all else becomes a list.

    Python numbers and strings are descriptions (ids, names), so they stay lists; what the model computes with comes
    from the data set as tensors. Text tokens ``X`` (T, ...) of different number that have a mask ``X_mask`` (T,) are
    padded to the most, with zeros in both.

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
        items = _of_equal_length(items)
        for key in first:
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


def _of_equal_length(items: Sequence[Mapping]) -> Sequence[Mapping]:
    """Items whose masked tokens are padded to the same number."""
    masks = [key for key in items[0] if isinstance(key, str) and key.endswith(MASK_SUFFIX)]
    for mask in masks:
        name = mask.removesuffix(MASK_SUFFIX)
        if not isinstance(items[0].get(name), torch.Tensor) or len({len(item[name]) for item in items}) == 1:
            continue
        longest = max(len(item[name]) for item in items)
        items = [{**item, **{key: _padded(item[key], longest) for key in (name, mask)}} for item in items]
    return items


def _padded(value: torch.Tensor, length: int) -> torch.Tensor:
    return F.pad(value, (*(0, 0) * (value.dim() - 1), 0, length - len(value)))
