"""Heun's method for the probability-flow ODE."""

from __future__ import annotations

import torch
from torch import Tensor

from lakonlab.models.diffusions.schedulers.base import VelocityScheduler


class FlowHeunODEScheduler(VelocityScheduler):
    """Euler predictor and trapezoidal corrector, of second order; the arguments are those of the base class.

    A step evaluates the model at both of its ends, except that the last one is an Euler step, so that the model is
    never asked at noise level 0. ``timesteps`` and ``sigmas`` list the noise level of every evaluation: each but the
    first occurs twice, as the end of one step and as the start of the next (the layout of diffusers'
    ``FlowMatchHeunDiscreteScheduler``).
    """

    order = 2

    @classmethod
    def num_function_evaluations(cls, num_inference_steps: int) -> int:
        return 2 * num_inference_steps - 1

    def _set_levels(self, levels: Tensor, device: torch.device | str | None) -> None:
        inner = levels[1:-1].repeat_interleave(2)
        super()._set_levels(torch.cat([levels[:1], inner, levels[-1:]]), device)
        self._start: tuple[Tensor, Tensor] | None = None

    def _advance(self, index: int, u: Tensor, sample: Tensor, generator) -> Tensor:
        if index % 2 == 0:
            self._start = sample, u
            return sample + u * (self.levels[index + 1] - self.levels[index])
        if self._start is None:
            raise ValueError(f'begin_index={index} is the second half of a Heun step: begin at an even index')
        sample, u_start = self._start
        self._start = None
        return sample + (u_start + u) * (0.5 * (self.levels[index] - self.levels[index - 1]))
