"""Items of a data set to a batch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor
from torch.utils.data import get_worker_info

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
        ValueError: Tensors of different shapes or dtypes stand under one key.
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
    if isinstance(first, Tensor):
        shapes = {tuple(item.shape) for item in items}
        if len(shapes) > 1:
            raise ValueError(f'cannot stack tensors of shapes {sorted(shapes)} into one batch')
        dtypes = {item.dtype for item in items}
        if len(dtypes) > 1:
            raise ValueError(f'cannot stack tensors of types {", ".join(sorted(map(str, dtypes)))} into one batch')
        if get_worker_info() is None or not first.is_cpu:
            return torch.stack(list(items))
        return torch.stack(list(items), out=empty_batch((len(items), *first.shape), first.dtype))
    return list(items)


def items_of(batch: Sequence | Mapping) -> list:
    """The items of which :func:`collate` makes a batch; views of it.

    Args:
        batch: A batch; or items, which are returned as they are.
    """
    if not isinstance(batch, Mapping):
        return list(batch)
    columns = {key: items_of(column) for key, column in batch.items()}
    return [dict(zip(columns, row)) for row in zip(*columns.values())]


def empty_batch(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Memory for a batch, to be filled.

    In a worker of a loader it is memory that the process which trains can read, so that it need not be copied there.

    Args:
        shape: Shape of the batch.
        dtype: Its dtype.
    """
    if get_worker_info() is None:
        return torch.empty(tuple(shape), dtype=dtype)
    size = math.prod(shape) * dtype.itemsize
    storage = torch.UntypedStorage._new_shared(size)  # as torch's own collation does
    return torch.empty(0, dtype=dtype).set_(storage, 0, tuple(shape))


def _of_equal_length(items: Sequence[Mapping]) -> Sequence[Mapping]:
    """Items whose masked tokens are padded to the same number."""
    masks = [key for key in items[0] if isinstance(key, str) and key.endswith(MASK_SUFFIX)]
    for mask in masks:
        name = mask.removesuffix(MASK_SUFFIX)
        if not isinstance(items[0].get(name), torch.Tensor) or len({len(item[name]) for item in items}) == 1:
            continue
        longest = max(len(item[name]) for item in items)
        items = [{**item, **{key: pad_tokens(item[key], longest) for key in (name, mask)}} for item in items]
    return items


def pad_tokens(tokens: torch.Tensor, length: int) -> torch.Tensor:
    """Bring tokens (T, ...) to a number of them: with zeros behind, or cut."""
    tokens = tokens[:length]
    return F.pad(tokens, (*(0, 0) * (tokens.dim() - 1), 0, length - len(tokens)))
