"""The best values of numbers so far, which tell when the weights of a run are worth keeping."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

logger = logging.getLogger('lakonlab.evaluation')


def numbers_that_decide(
    choices: Sequence[Mapping[str, str]], wanted: str | Sequence[str] | None, name: str
) -> dict[str, str]:
    """Choose the numbers by each of which a best checkpoint is kept.

    Args:
        choices: Of each metric of an entry, ``better``: number -> ``'lower'`` or ``'higher'``.
        wanted: Name of the number, or names of several; None for the first that tells better weights from worse ones.
        name: Config key of the entry, for messages.

    Returns:
        Name of each -> ``'lower'`` or ``'higher'``, whichever is better.

    Raises:
        ValueError: There is no such number, or none at all, or one is named twice.
    """
    rules = {number: better for choice in choices for number, better in choice.items()}
    if wanted is None and rules:
        return dict([next(iter(rules.items()))])
    names = list(wanted) if isinstance(wanted, (list, tuple)) else [wanted]
    if names and all(isinstance(number, str) and number in rules for number in names):
        if len(set(names)) < len(names):
            raise ValueError(f'{name}.best_metric: found {wanted!r}, which names a number twice')
        return {number: rules[number] for number in names}
    found = f'{name}.best_metric: found {wanted!r}, '
    if not rules:
        raise ValueError(
            f'{found}but no metric of this entry tells better weights from worse ones; add one that does, or set '
            'save_best_ckpt=False'
        )
    raise ValueError(f'{found}expected numbers of metrics of this entry: {", ".join(map(repr, rules))}')


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
        """Restore the value."""
        self.value, self.step = state['value'], state['step']


def restore(best: Sequence[BestValue], states: Sequence[Mapping[str, Any]]) -> None:
    """Restore values by the names of their numbers; those of numbers that are not kept any more are forgotten.

    Args:
        best: What decides now.
        states: Their :meth:`BestValue.state_dict` in a checkpoint.
    """
    by_name = {value.name: value for value in best}
    for state in states:
        if state['name'] in by_name:
            by_name[state['name']].load_state_dict(state)
        else:
            logger.info(
                'the best %s so far is forgotten: best checkpoints are now chosen by %s',
                state['name'],
                ', '.join(by_name),
            )
