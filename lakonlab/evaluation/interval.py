"""When a run in training is evaluated."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence

Interval = int | Mapping[str, Sequence[int]] | None
"""Iterations between evaluations; or ``milestones`` [m1, ...] and ``interval`` [i0, i1, ...], where the n-th interval
holds from the n-th milestone on; None for never."""


def is_multiple(interval: Interval, iteration: int) -> bool:
    """Whether an iteration is a multiple of the interval that holds there.

    Args:
        interval: As :func:`checked_interval` returns it.
        iteration: Number of completed iterations.
    """
    if isinstance(interval, Mapping):
        interval = interval['interval'][bisect_right(interval['milestones'], iteration)]
    return interval is not None and iteration % interval == 0


def checked_interval(interval: Interval) -> int | dict[str, list[int]] | None:
    """The same as plain data.

    Args:
        interval: What a config says.

    Raises:
        ValueError: It is none.
    """
    if interval is None:
        return None
    if isinstance(interval, Mapping):
        if set(interval) != {'milestones', 'interval'}:
            raise ValueError(f'evaluation.interval has keys {sorted(interval)}; expected milestones and interval')
        milestones, intervals = list(interval['milestones']), list(interval['interval'])
        if len(intervals) != len(milestones) + 1 or sorted(milestones) != milestones:
            raise ValueError(
                f'evaluation.interval: {len(milestones)} milestones {milestones} in increasing order need '
                f'{len(milestones) + 1} intervals, found {intervals}'
            )
        interval, values = dict(milestones=milestones, interval=intervals), intervals
    else:
        values = [interval]
    if any(not isinstance(value, int) or value < 1 for value in values):
        raise ValueError(f'evaluation.interval={interval}: expected positive whole numbers of iterations')
    return interval
