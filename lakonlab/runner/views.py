"""The run as mmengine's hooks expect to see it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch.optim import Optimizer


class LearningRates:
    """The optimisers as mmengine's hooks see them: ``runner.optim_wrapper``.

    Args:
        optimizers: By key.
    """

    def __init__(self, optimizers: Mapping[str, Optimizer]):
        self._optimizers = optimizers

    def _collect(self, name: str, value_of: Callable[[dict], float]) -> dict[str, list[float]]:
        single = len(self._optimizers) == 1
        return {
            name if single else f'{key}.{name}': [value_of(group) for group in optimizer.param_groups]
            for key, optimizer in self._optimizers.items()
        }

    def get_lr(self) -> dict[str, list[float]]:
        """``lr`` (or ``<optimizer key>.lr`` if there are several) -> rate of each parameter group."""
        return self._collect('lr', lambda group: group['lr'])

    def get_momentum(self) -> dict[str, list[float]]:
        """``momentum`` -> momentum or first beta of each parameter group."""
        return self._collect('momentum', lambda group: group.get('momentum', group.get('betas', (0.0,))[0]))


class TrainingStream:
    """What a run reads, as the loader that mmengine's hooks expect: its length is the run's.

    Args:
        batches: Yields the batch of the run's next iteration, and on.
        dataset: Where the items come from.
        total: Iterations of the whole run.
    """

    def __init__(self, batches: Iterable, dataset: Any, total: int):
        self.batches, self.dataset, self.total = batches, dataset, total

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator:
        return iter(self.batches)
