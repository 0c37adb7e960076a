"""Which items of a data set are used."""

from __future__ import annotations


def item_range(size: int, start: int | None, end: int | None) -> range:
    """The items ``[start:end]`` of ``size``, as Python slices a list.

    Args:
        size: Number of items.
        start: First one; negative numbers count from the end.
        end: The one after the last.

    Raises:
        ValueError: There is no item in it.
    """
    chosen = range(size)[slice(start, end)]
    if len(chosen) == 0:
        raise ValueError(f'start_ind={start!r}, end_ind={end!r}: there is no such part of {size} prompts')
    return chosen
