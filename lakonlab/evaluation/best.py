"""The best value of a number so far, which tells when the weights of a run are worth keeping."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

logger = logging.getLogger('lakonlab.evaluation')


def number_that_decides(
    choices: Sequence[Mapping[str, str]], wanted: str | Sequence[str] | None, name: str
) -> tuple[str, str]:
    """Choose the number by which the best checkpoint is chosen.

    Args:
        choices: Of each metric of an entry, ``better``: number -> ``'lower'`` or ``'higher'``.
        wanted: Name of the number, or several of which the first one counts; None for the first that tells better
            weights from worse ones.
        name: Config key of the entry, for messages.

    Returns:
        The name, and ``'lower'`` or ``'higher'``, whichever is better.

    Raises:
        ValueError: There is no such number, or none at all.
    """
    rules = {number: better for choice in choices for number, better in choice.items()}
    if wanted is None and rules:
        return next(iter(rules.items()))
    first = wanted[0] if isinstance(wanted, (list, tuple)) and wanted else wanted
    if isinstance(first, str) and first in rules:
        return first, rules[first]
    found = f'{name}.best_metric: found {wanted!r}, '
    if not rules:
        raise ValueError(
            f'{found}but no metric of this entry tells better weights from worse ones; add one that does, or set '
            'save_best_ckpt=False'
        )
    raise ValueError(f'{found}expected a number of a metric of this entry: {", ".join(map(repr, rules))}')


class BestValue:
    """The best value of one number, and when it was reached.

    Args:
        name: Name of the number.
        better: ``'lower'`` or ``'higher'``.
    """

    def __init__(self, name: str, better: str):
        self.name = name
        self.better = better
        self.value: float | None = None
        self.step: int | None = None

    def update(self, value: float, step: int) -> bool:
        """Take in a value.

        Args:
            value: A value; NaN is never the best.
            step: Completed iterations.

        Returns:
            Whether it is better than all before.
        """
        if math.isnan(value):
            return False
        if self.value is not None and not (value < self.value if self.better == 'lower' else value > self.value):
            return False
        self.value, self.step = value, step
        return True

    def state_dict(self) -> dict[str, Any]:
        """The value as plain data."""
        return dict(name=self.name, value=self.value, step=self.step)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the value, unless it is that of another number."""
        if state['name'] != self.name:
            logger.info(
                'the best %s so far is forgotten: the best checkpoint is now chosen by %s', state['name'], self.name
            )
            return
        self.value, self.step = state['value'], state['step']
