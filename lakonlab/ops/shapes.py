"""Shape helpers shared by everything that handles per-sample scalars and nested batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def expand_like(per_sample: Tensor, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Give a per-sample quantity (B,) the singleton dimensions, device and dtype of ``x``, or another dtype."""
    return per_sample.to(device=x.device, dtype=dtype or x.dtype).reshape(-1, *([1] * (x.dim() - 1)))


def map_batch(function: Callable[[Any], Any], data: Any) -> Any:
    """Apply ``function`` to every tensor and list found in (nested) dicts; other values stay as they are."""
    if isinstance(data, dict):
        return {key: map_batch(function, value) for key, value in data.items()}
    if isinstance(data, (Tensor, list, tuple)):
        return function(data)
    return data


def batch_size_of(data: Any) -> int:
    """Length of the first tensor or list found in ``data``.

    Raises:
        ValueError: There is none.
    """
    stack = [data]
    while stack:
        item = stack.pop(0)
        if isinstance(item, dict):
            stack[:0] = item.values()
        elif isinstance(item, (list, tuple)) or (isinstance(item, Tensor) and item.dim() > 0):
            return len(item)
    raise ValueError('the batch holds neither a tensor nor a list, so its size is unknown')


def select_rows(data: Any, rows: slice | Tensor) -> Any:
    """Rows of every tensor and list in (nested) dicts.

    Args:
        data: Dict of batched values, or one such value.
        rows: A slice, or a 1-D tensor of indices.
    """

    def select(value):
        if isinstance(value, Tensor):
            return value[rows] if isinstance(rows, slice) else value[rows.to(value.device)]
        return value[rows] if isinstance(rows, slice) else [value[row] for row in rows.tolist()]

    return map_batch(select, data)


def concatenate_rows(first: Any, second: Any) -> Any:
    """Concatenate two batches of the same structure along the batch dimension.

    Raises:
        ValueError: One has a key that the other lacks.
    """
    if isinstance(first, dict):
        if first.keys() != second.keys():
            alone = sorted(map(str, first.keys() ^ second.keys()))
            raise ValueError(f'only one of two batches that belong together has {", ".join(alone)}')
        return {key: concatenate_rows(value, second[key]) for key, value in first.items()}
    if isinstance(first, Tensor):
        return torch.cat([first, second])
    if isinstance(first, (list, tuple)):
        return [*first, *second]
    return first


def repeat_groups(data: Any, group_size: int, times: int) -> Any:
    """Repeat each group of rows of a batch, so that a batch of [negative; positive] conditions stays in this order.

    Args:
        data: Dict of batched values (nested dicts too) whose lengths are multiples of ``group_size``.
        group_size: Rows of a group.
        times: How often a group is to appear, one copy after the other.
    """
    if times == 1:
        return data

    def repeat(value):
        groups = [value[start : start + group_size] for start in range(0, len(value), group_size)]
        copies = [group for group in groups for _ in range(times)]
        return torch.cat(copies) if isinstance(value, Tensor) else [row for copy in copies for row in copy]

    return map_batch(repeat, data)
