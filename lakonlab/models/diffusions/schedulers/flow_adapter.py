"""Solvers of diffusers driven on the noise levels of our shifted schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from lakonlab.models.diffusions.schedulers.base import VelocityScheduler
from lakonlab.ops.random_source import RandomSource


@dataclass(frozen=True)
class BaseSolver:
    """How a solver of diffusers is driven.

    Args:
        knows_flows: It takes velocities and states of a flow; the others take noise predictions and states
            ``x / alpha`` at noise levels ``sigma / alpha``.
        largest_sigma: Noise level that stands for pure noise: they divide by alpha or take its logarithm.
        moves_state: The state at pure noise is moved there along the velocity, rather than taken to be there.
        last_sigma: Noise level at which the last step ends.
        in_double: It is given tensors in double precision, because it subtracts numbers 1 / alpha times as large as
            their difference in the first step.
        arguments: Arguments of its constructor.
        is_random: It draws noise in every step.
        uses_first_prediction: The published choice, see :class:`FlowAdapterScheduler`.
    """

    knows_flows: bool = True
    largest_sigma: float = 1 - 1e-4
    moves_state: bool = True
    last_sigma: float = 0.0
    in_double: bool = False
    arguments: tuple[tuple[str, Any], ...] = ()
    is_random: bool = False
    uses_first_prediction: bool = False


# The Euler solvers compute in single precision whatever they are given, and subtract such numbers too; the larger alpha
# keeps the rounding error of their first step at 1e-5.
BASE_SOLVERS: dict[str, BaseSolver] = {
    'UniPCMultistep': BaseSolver(moves_state=False, uses_first_prediction=True),  # as published
    'DPMSolverMultistep': BaseSolver(),
    'DPMSolverSinglestep': BaseSolver(arguments=(('lower_order_final', True),)),
    'DEISMultistep': BaseSolver(last_sigma=1e-4, in_double=True),
    'SASolver': BaseSolver(last_sigma=1e-4, is_random=True),
    'EulerDiscrete': BaseSolver(knows_flows=False, largest_sigma=1 - 1e-3),
    'EulerAncestralDiscrete': BaseSolver(knows_flows=False, largest_sigma=1 - 1e-3, is_random=True),
}

# Unit of the timesteps that the solvers are given; the default of SASolver's tau_func is written for it.
BASE_TIMESTEPS = 1000


class FlowAdapterScheduler(VelocityScheduler):
    """A solver of diffusers on our grid of noise levels.

    Args:
        base_scheduler: Class name in diffusers without the ending ``Scheduler``, one of :data:`BASE_SOLVERS`.
        base_scheduler_kwargs: Further arguments of that class.
        use_first_prediction: Use the model's prediction at pure noise, or take ``x_0 = 0`` there. Left out, it is as
            published, so that published figures are reproduced: used by ``UniPCMultistep`` only. True is the better
            choice: the other wastes an evaluation and biases the samples where the mean of the data is not 0.
        **kwargs: Arguments of :class:`~lakonlab.models.diffusions.schedulers.base.VelocityScheduler`.

    Raises:
        ValueError: ``base_scheduler`` is unknown.
    """

    @register_to_config
    def __init__(
        self,
        *,
        base_scheduler: str = 'UniPCMultistep',
        base_scheduler_kwargs: dict[str, Any] | None = None,
        use_first_prediction: bool | None = None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        if base_scheduler not in BASE_SOLVERS:
            raise ValueError(f'base_scheduler={base_scheduler!r}: expected one of {", ".join(BASE_SOLVERS)}')
        self.solver = BASE_SOLVERS[base_scheduler]
        arguments = {'num_train_timesteps': BASE_TIMESTEPS, **dict(self.solver.arguments)}
        if self.solver.knows_flows:
            arguments |= {'prediction_type': 'flow_prediction', 'use_flow_sigmas': True}
        self.base = getattr(diffusers, f'{base_scheduler}Scheduler')(**{**arguments, **(base_scheduler_kwargs or {})})
        self.order = self.base.order

    @property
    def uses_first_prediction(self) -> bool:
        """Whether the prediction at pure noise has an effect."""
        choice = self.config.use_first_prediction
        return self.solver.uses_first_prediction if choice is None else choice

    @property
    def is_random(self) -> bool:
        """Whether the solver draws noise."""
        return self.solver.is_random or self.base.config.get('algorithm_type', '').startswith('sde')

    def _set_levels(self, levels: Tensor, device: torch.device | str | None) -> None:
        levels = torch.cat([levels[:-1], levels.new_tensor([self.solver.last_sigma])])
        super()._set_levels(levels, device)
        self.base.set_timesteps(len(levels) - 1)
        inner = levels.clamp(max=self.solver.largest_sigma)
        self._inner_levels: list[float] = inner.tolist()
        self.base.sigmas = inner if self.solver.knows_flows else inner / (1 - inner)
        self.base.timesteps = (levels[:-1] * BASE_TIMESTEPS).float()
        self.base.is_scale_input_called = True  # the state is scaled here

    def random_arguments(self, step_index: int, source: RandomSource, sample: Tensor) -> dict[str, Any]:
        """Generators for a solver that draws its own noise, one per sample, seeded by the draw ``step_noise`` (B,)."""
        if not self.is_random:
            return {}
        seeds = source.uniform('step_noise', (len(sample),), torch.float64).tolist()
        return {'generator': [torch.Generator().manual_seed(int(seed * 2**53)) for seed in seeds]}

    def _advance(self, index: int, u: Tensor, sample: Tensor, generator) -> Tensor:
        if self.base.step_index is None:
            self.base.set_begin_index(index)
        sigma, inner, inner_to = self.levels[index], *self._inner_levels[index : index + 2]
        if inner < sigma and not self.uses_first_prediction:
            u = sample / sigma
        output, state = u, sample + (inner - sigma) * u if self.solver.moves_state else sample
        if not self.solver.knows_flows:
            output, state = sample + (1 - sigma) * u, state / (1 - inner)
        if self.solver.in_double:
            output, state = output.double(), state.double()
        kwargs = {'generator': generator} if self.is_random else {}
        timestep = sigma * BASE_TIMESTEPS
        state = self.base.step(output, timestep, state, return_dict=False, **kwargs)[0]
        return state if self.solver.knows_flows else state * (1 - inner_to)
