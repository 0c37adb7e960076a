"""The Euler method for the probability-flow ODE."""

from __future__ import annotations

from diffusers.configuration_utils import register_to_config
from torch import Tensor

from lakonlab.models.diffusions.schedulers.base import FlowScheduler, FlowSchedulerOutput, velocity_from


class FlowEulerODEScheduler(FlowScheduler):
    """Euler steps ``x += u * (sigma_to - sigma)`` on a shifted uniform grid.

    Args:
        num_train_timesteps: Unit of the timesteps given to the model.
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
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
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
        self._reset()

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
            generator: Unused; accepted as by every scheduler.
            return_dict: Return an output object instead of a tuple.
            prediction_type: What ``model_output`` is: ``'u'`` or ``'x0'``.
        """
        index = self._next_step(timestep)
        sigma, sigma_to = self.levels[index], self.levels[index + 1]
        u = velocity_from(model_output, sample, sigma, prediction_type)
        prev_sample = sample + u * (sigma_to - sigma)
        return FlowSchedulerOutput(prev_sample=prev_sample) if return_dict else (prev_sample,)
