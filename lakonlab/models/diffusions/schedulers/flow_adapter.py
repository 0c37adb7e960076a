"""Solvers of diffusers that know flows, driven on the noise levels of our shifted schedule."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from lakonlab.models.diffusions.schedulers.base import FlowScheduler, FlowSchedulerOutput, velocity_from

# Largest noise level given to a solver: they take the logarithm of 1 - sigma.
LARGEST_SIGMA = {'UniPCMultistep': 1 - 1e-6}


class FlowAdapterScheduler(FlowScheduler):
    """A multistep solver of diffusers on a shifted uniform grid.

    Args:
        num_train_timesteps: Unit of the timesteps given to the model.
        base_scheduler: Class name in diffusers without the ending ``Scheduler``, one of :data:`LARGEST_SIGMA`.
        base_scheduler_kwargs: Further arguments of that class.
        shift: Shift of the schedule.
        use_dynamic_shifting: Take the shift from the length of the latent.
        dynamic_shifting_type: ``'exp'`` or ``'sqrt'``.
        base_seq_len: See :func:`lakonlab.ops.time_shift.dynamic_shift`, as the next three.
        max_seq_len: See ``base_seq_len``.
        base_logshift: See ``base_seq_len``.
        max_logshift: See ``base_seq_len``.
        terminal_sigma: Stretch the grid so that its last step begins at this noise level.
        max_raw_t: Schedule time of the first step.
        min_raw_t: Schedule time at which the last step ends.
        use_fp64: Keep ``sigmas`` and ``timesteps`` in double precision.

    Raises:
        ValueError: ``base_scheduler`` is unknown.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        base_scheduler: str = 'UniPCMultistep',
        base_scheduler_kwargs: dict[str, Any] | None = None,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        dynamic_shifting_type: str = 'exp',
        base_seq_len: int = 256,
        max_seq_len: int = 4096,
        base_logshift: float = 0.5,
        max_logshift: float = 1.15,
        terminal_sigma: float | None = None,
        max_raw_t: float = 1.0,
        min_raw_t: float = 0.0,
        use_fp64: bool = False,
    ):
        if base_scheduler not in LARGEST_SIGMA:
            raise ValueError(f'base_scheduler={base_scheduler!r}: expected one of {", ".join(LARGEST_SIGMA)}')
        self._reset()
        arguments = {'prediction_type': 'flow_prediction', 'use_flow_sigmas': True, 'lower_order_final': True}
        base_class = getattr(diffusers, f'{base_scheduler}Scheduler')
        self.base = base_class(**arguments, **(base_scheduler_kwargs or {}))

    def _set_levels(self, levels: Tensor, device: torch.device | str | None) -> None:
        super()._set_levels(levels, device)
        self.base.set_timesteps(len(levels) - 1, device=device)
        inner = levels[:-1].clamp(max=LARGEST_SIGMA[self.config.base_scheduler])
        self.base.sigmas = torch.cat([inner, levels[-1:]]).float()
        self.base.timesteps = self.timesteps
        self.base.set_begin_index(0)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator=None,
        return_dict: bool = True,
        prediction_type: str = 'u',
    ) -> FlowSchedulerOutput | tuple[Tensor]:
        """Take one step.

        Args:
            model_output: Prediction at ``sample``, same shape.
            timestep: Where the step begins.
            sample: State, (B, C, *).
            generator: Passed on to solvers that draw noise.
            return_dict: Return an output object instead of a tuple.
            prediction_type: What ``model_output`` is: ``'u'`` or ``'x0'``.
        """
        index = self._next_step(timestep)
        u = velocity_from(model_output, sample, self.levels[index], prediction_type)
        kwargs = {} if generator is None else {'generator': generator}
        prev_sample = self.base.step(u, timestep, sample, return_dict=False, **kwargs)[0]
        return FlowSchedulerOutput(prev_sample=prev_sample) if return_dict else (prev_sample,)
