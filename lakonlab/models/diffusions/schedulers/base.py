"""What all flow schedulers share: the shifted grid of noise levels and the place of a step in it.

Noise levels are kept as Python floats beside the tensors that diffusers pipelines read: a step is computed from them in
double precision and never waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from torch import Tensor

from lakonlab.models.diffusions.sampler import shift_for
from lakonlab.ops.time_shift import stretch_to_terminal, warp


class FlowSchedulerOutput(BaseOutput):
    """Result of a step: ``prev_sample``, the state at the next noise level."""

    prev_sample: Tensor


class FlowScheduler(SchedulerMixin, ConfigMixin):
    """Base of the flow schedulers; a subclass registers its arguments and implements ``step``."""

    order = 1

    def _reset(self) -> None:
        self.num_inference_steps: int | None = None
        self.sigmas = torch.ones(1)
        self.timesteps = torch.full((1,), float(self.config.num_train_timesteps))
        self.levels: list[float] = [1.0]
        self._step_index: int | None = None
        self._begin_index: int | None = None

    @property
    def step_index(self) -> int | None:
        """Index of the next step; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Index of the first step, where a pipeline does not begin at the first noise level."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin at another step than the first, as image-to-image pipelines do."""
        self._begin_index = begin_index

    def get_shift(self, seq_len: int | None = None) -> float:
        """Shift for a latent of ``seq_len`` pixels."""
        c = self.config
        return shift_for(
            seq_len,
            shift=c.shift,
            use_dynamic_shifting=c.use_dynamic_shifting,
            dynamic_shifting_type=c.dynamic_shifting_type,
            base_seq_len=c.base_seq_len,
            max_seq_len=c.max_seq_len,
            base_logshift=c.base_logshift,
            max_logshift=c.max_logshift,
        )

    def _raw_grid(self, num_inference_steps: int) -> Tensor:
        """Schedule times at which the steps begin, decreasing, float64."""
        c = self.config
        return torch.linspace(c.max_raw_t, c.min_raw_t, num_inference_steps + 1, dtype=torch.float64)[:-1]

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        sigmas: Sequence[float] | None = None,
        seq_len: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Lay out the grid of noise levels.

        Args:
            num_inference_steps: Number of steps; may be left out if ``sigmas`` is given.
            sigmas: Schedule times (before the shift) at which the steps begin, decreasing in (0, 1].
            seq_len: Latent pixels of a sample, for dynamic shifting.
            device: Device of ``timesteps``.

        Raises:
            ValueError: Neither or inconsistent numbers of steps are given.
        """
        if sigmas is None:
            if num_inference_steps is None or num_inference_steps < 1:
                raise ValueError(f'num_inference_steps={num_inference_steps}: expected a positive number, or sigmas')
            raw = self._raw_grid(num_inference_steps)
        else:
            raw = torch.as_tensor(sigmas, dtype=torch.float64)
            if num_inference_steps is not None and num_inference_steps != len(raw):
                raise ValueError(f'{len(raw)} sigmas were given for num_inference_steps={num_inference_steps}')
        self.num_inference_steps = len(raw)
        shift = self.get_shift(seq_len)
        levels = warp(raw, shift)
        terminal_sigma = getattr(self.config, 'terminal_sigma', None)
        if terminal_sigma:
            levels = stretch_to_terminal(levels, terminal_sigma)
        last = warp(torch.tensor([self.config.min_raw_t], dtype=torch.float64), shift)
        self._set_levels(torch.cat([levels, last]), device)

    def _set_levels(self, levels: Tensor, device: torch.device | str | None) -> None:
        dtype = torch.float64 if self.config.use_fp64 else torch.float32
        self.levels = levels.tolist()
        self.sigmas = levels.to(dtype)
        self.timesteps = (levels[:-1] * self.config.num_train_timesteps).to(device=device, dtype=dtype)
        self._step_index = self._begin_index = None

    def _next_step(self, timestep: float | Tensor) -> int:
        """Index of the step that begins at ``timestep``; the counter moves on to the one after it."""
        if self._step_index is None:
            if self._begin_index is not None:
                self._step_index = self._begin_index
            else:
                sigma = float(timestep) / self.config.num_train_timesteps
                self._step_index = min(range(len(self.levels) - 1), key=lambda i: abs(self.levels[i] - sigma))
        if self._step_index >= len(self.levels) - 1:
            raise ValueError(f'all {len(self.levels) - 1} steps were taken; call set_timesteps before sampling again')
        index = self._step_index
        self._step_index += 1
        return index

    def noise_scale(self, step_index: int) -> float:
        """Factor of the fresh noise in a step; 0 where the step is deterministic, so that nothing need be drawn."""
        return 0.0

    def _fresh_noise(self, sample: Tensor, noise: Tensor | None, generator) -> Tensor:
        if noise is None:
            from diffusers.utils.torch_utils import randn_tensor

            noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
        return noise

    def scale_noise(self, sample: Tensor, timestep: float | Tensor, noise: Tensor) -> Tensor:
        """Diffuse clean latents to a timestep: ``(1 - sigma) * sample + sigma * noise``."""
        sigma = torch.as_tensor(timestep, dtype=sample.dtype, device=sample.device) / self.config.num_train_timesteps
        sigma = sigma.reshape(-1, *([1] * (sample.dim() - 1)))
        return (1 - sigma) * sample + sigma * noise

    def __len__(self) -> int:
        return self.config.num_train_timesteps


def velocity_from(model_output: Tensor, sample: Tensor, sigma: float, prediction_type: str) -> Tensor:
    """Velocity of a prediction.

    Args:
        model_output: Prediction at ``sample``.
        sample: State, same shape.
        sigma: Its noise level.
        prediction_type: ``'u'`` (velocity) or ``'x0'``.

    Raises:
        ValueError: Another ``prediction_type``.
    """
    if prediction_type == 'u':
        return model_output
    if prediction_type == 'x0':
        return (sample - model_output) / sigma
    raise ValueError(f"prediction_type={prediction_type!r}: expected 'u' or 'x0'")


def remaining_noise_ratio(sigma: float, sigma_to: float, h: float | str) -> float:
    """Share ``m`` of the present noise that survives a stochastic step; the rest is fresh.

    ``m = ((sigma_to alpha) / (sigma alpha_to)) ** (h ** 2)``: ``h = 0`` keeps all of it (the ODE), ``h = 1`` is the SDE
    of the forward process, ``h = 'inf'`` replaces all of it.

    Args:
        sigma: Noise level of the state, in (0, 1].
        sigma_to: Noise level after the step, below ``sigma``.
        h: Non-negative, or ``'inf'``.
    """
    h = float(h)
    if h == 0:
        return 1.0
    if h == float('inf'):
        return 0.0
    return (sigma_to * (1 - sigma) / (sigma * (1 - sigma_to))) ** (h * h)
