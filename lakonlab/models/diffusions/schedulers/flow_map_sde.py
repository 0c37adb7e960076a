"""Sampling with a flow map: a policy carries the state to a destination, the scheduler re-noises it."""

from __future__ import annotations

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin  # noqa: F401 - how saved pipelines know what this is
from torch import Tensor

from lakonlab.models.diffusions.schedulers.base import FlowScheduler, FlowSchedulerOutput, remaining_noise_ratio
from lakonlab.models.diffusions.schedulers.h_expression import noise_amount

# Relative length of the last segment below which it would not be a segment; training has the same floor.
SHORTEST_STEP = 1e-4


class FlowMapSDEScheduler(FlowScheduler):
    """Segments of a few-step generator: where each begins, to which noise level it is solved, and the re-noising.

    The grid of ``n`` segments gives the last one ``final_step_size_scale`` times the length of the others in schedule
    time. With ``h = 0`` a segment is solved down to the start of the next. With ``h > 0`` it is solved further, to
    ``sigma_dst = sigma_to m / (alpha_to + sigma_to m)``, and fresh noise makes up for the difference.

    Args:
        h: Amount of noise at the start of a segment: 0 none, 1 the SDE of the forward process, ``'inf'`` re-noising, or
            an expression in ``sigma``, see :func:`~lakonlab.models.diffusions.schedulers.h_expression.noise_amount`.
        final_step_size_scale: Length of the last segment relative to the others.
        **kwargs: Arguments of :class:`~lakonlab.models.diffusions.schedulers.base.FlowScheduler`.

    Raises:
        ValueError: ``h`` is not understood.
    """

    @register_to_config
    def __init__(self, *, h: float | str = 0.0, final_step_size_scale: float = 1.0, **kwargs):
        super().__init__(**kwargs)
        self.noise_amount = noise_amount(h)
        self.destinations: list[float] = [0.0]
        self.ratios: list[float] = [1.0]

    def _raw_grid(self, num_inference_steps: int) -> Tensor:
        c = self.config
        scale = max(c.final_step_size_scale, SHORTEST_STEP)
        last = c.min_raw_t + (c.max_raw_t - c.min_raw_t) * scale / (num_inference_steps - 1 + scale)
        return torch.linspace(c.max_raw_t, last, num_inference_steps, dtype=torch.float64)

    def _set_levels(self, levels: Tensor, device: torch.device | str | None) -> None:
        super()._set_levels(levels, device)
        pairs = list(zip(self.levels, self.levels[1:]))
        self.ratios = [remaining_noise_ratio(sigma, sigma_to, self.noise_amount(sigma)) for sigma, sigma_to in pairs]
        self.destinations = [
            sigma_to * ratio / (1 - sigma_to + sigma_to * ratio) for (_, sigma_to), ratio in zip(pairs, self.ratios)
        ]
        self.m_vals = torch.tensor(self.ratios, dtype=self.sigmas.dtype)
        self.timesteps_dst = torch.tensor(
            [sigma * self.config.num_train_timesteps for sigma in self.destinations],
            dtype=self.timesteps.dtype,
            device=device,
        )

    def noise_scale(self, step_index: int) -> float:
        return self.levels[step_index + 1] * (1 - self.ratios[step_index] ** 2) ** 0.5

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        noise: Tensor | None = None,
    ) -> FlowSchedulerOutput | tuple[Tensor]:
        """Re-noise the state that the flow map has reached.

        Args:
            model_output: State at the destination ``timesteps_dst`` of the segment, (B, C, *).
            timestep: Where the segment began.
            sample: Unused; accepted as by every scheduler.
            generator: Generator of the fresh noise, or one per sample; torch's global one if left out.
            return_dict: Return an output object instead of a tuple.
            noise: The fresh noise itself, same shape as the state; drawn if left out.

        Returns:
            The state at the next noise level, in the dtype of ``model_output``.
        """
        index = self._next_step(timestep)
        sigma_to = self.levels[index + 1]
        state = model_output.to(torch.promote_types(model_output.dtype, torch.float32))
        state = (1 - sigma_to + sigma_to * self.ratios[index]) * state
        return self._finish(index, state, model_output.dtype, noise, generator, return_dict)
