"""The Euler method for the probability-flow ODE."""

from __future__ import annotations

from torch import Tensor

from lakonlab.models.diffusions.schedulers.base import VelocityScheduler


class FlowEulerODEScheduler(VelocityScheduler):
    """Euler steps ``x += u * (sigma_to - sigma)``; the arguments are those of the base class."""

    def _advance(self, index: int, u: Tensor, sample: Tensor, generator) -> Tensor:
        return sample + u * (self.levels[index + 1] - self.levels[index])
