"""Stochastic sampling of a flow, from the ODE to full re-noising."""

from __future__ import annotations

from diffusers.configuration_utils import register_to_config
from torch import Tensor

from lakonlab.models.diffusions.schedulers.base import (
    FlowScheduler,
    FlowSchedulerOutput,
    remaining_noise_ratio,
    velocity_from,
)


class FlowSDEScheduler(FlowScheduler):
    """Predict ``x_0`` and the noise, keep a share ``m`` of the noise and replace the rest by fresh noise.

    ``x_to = alpha_to * x_0 + sigma_to * (m * noise + sqrt(1 - m^2) * fresh)``, with ``m`` of
    :func:`~lakonlab.models.diffusions.schedulers.base.remaining_noise_ratio`.

    Args:
        num_train_timesteps: Unit of the timesteps given to the model.
        h: Amount of noise: 0 the ODE, 1 the SDE of the forward process, ``'inf'`` re-noising.
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
        h: float | str = 1.0,
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
        if float(h) < 0:
            raise ValueError(f"h={h!r}: expected a non-negative number or 'inf'")
        self._reset()

    def _ratio(self, index: int) -> float:
        return remaining_noise_ratio(self.levels[index], self.levels[index + 1], self.config.h)

    def noise_scale(self, step_index: int) -> float:
        return self.levels[step_index + 1] * (1 - self._ratio(step_index) ** 2) ** 0.5

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator=None,
        return_dict: bool = True,
        prediction_type: str = 'u',
        noise: Tensor | None = None,
    ) -> FlowSchedulerOutput | tuple[Tensor]:
        """Take one step.

        Args:
            model_output: Prediction at ``sample``, same shape.
            timestep: Where the step begins.
            sample: State, (B, C, *).
            generator: ``torch.Generator`` of the fresh noise, or one per sample.
            return_dict: Return an output object instead of a tuple.
            prediction_type: What ``model_output`` is: ``'u'`` or ``'x0'``.
            noise: The fresh noise itself, same shape as ``sample``; drawn if left out.
        """
        index = self._next_step(timestep)
        sigma, sigma_to = self.levels[index], self.levels[index + 1]
        u = velocity_from(model_output, sample, sigma, prediction_type)
        x_0, epsilon = sample - sigma * u, sample + (1 - sigma) * u
        prev_sample = (1 - sigma_to) * x_0 + (sigma_to * self._ratio(index)) * epsilon
        scale = self.noise_scale(index)
        if scale > 0:
            prev_sample = prev_sample + scale * self._fresh_noise(sample, noise, generator)
        return FlowSchedulerOutput(prev_sample=prev_sample) if return_dict else (prev_sample,)
