"""What all flow schedulers share: the shifted grid of noise levels, the place of a step in it, and the frame of a step.

Noise levels are kept as Python floats beside the tensors that diffusers pipelines read: a step is computed from them in
double precision and never waits for the device.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from lakonlab.ops.random_source import RandomSource
from lakonlab.ops.time_shift import shift_for, stretch_to_terminal, warp


class FlowSchedulerOutput(BaseOutput):
    """Result of a step: ``prev_sample``, the state at the next noise level."""

    prev_sample: Tensor


def _signature_with_inherited(kind: type) -> inspect.Signature:
    """Signature of a constructor in which ``**kwargs`` is replaced by the arguments of the base's constructor."""
    own = inspect.signature(vars(kind)['__init__'])
    inherited = inspect.signature(super(kind, kind).__init__).parameters
    parameters = [p if name == 'self' else p.replace(kind=p.KEYWORD_ONLY) for name, p in inherited.items()]
    parameters += [p for name, p in own.parameters.items() if name != 'self' and p.kind is not p.VAR_KEYWORD]
    return own.replace(parameters=parameters)


class FlowScheduler(SchedulerMixin, ConfigMixin):
    """Base of the flow schedulers: a grid of noise levels, uniform in schedule time, shifted, ending at 0.

    A subclass implements ``step``, and ``noise_scale`` if it draws noise. Arguments of its own are keyword-only and
    registered; it hands the rest to this constructor, and its signature shows all of them.

    Args:
        num_train_timesteps: Unit of the timesteps given to the model, 1000 or 1.
        shift: Shift of the schedule, positive, see :func:`lakonlab.ops.time_shift.warp`.
        use_dynamic_shifting: Take the shift from the length of the latent, or from ``mu``, instead.
        dynamic_shifting_type: ``'exp'`` or ``'sqrt'``, see :func:`lakonlab.ops.time_shift.dynamic_shift`.
        base_seq_len: Latent pixels at which the logarithm of the dynamic shift is ``base_logshift``.
        max_seq_len: Latent pixels at which it is ``max_logshift``.
        base_logshift: See ``base_seq_len``.
        max_logshift: See ``max_seq_len``.
        max_raw_t: Schedule time of the first step.
        min_raw_t: Lower end of the uniform grid in schedule time. The last step begins one grid step above it and goes
            all the way to 0.
        use_fp64: Keep ``sigmas`` and ``timesteps`` in double precision.

    Raises:
        ValueError: A value is out of range.
    """

    order = 1
    init_noise_sigma = 1.0
    ignore_for_config = ['kwargs']

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if '__init__' in vars(cls):  # diffusers learns from the signature what from_config may pass on
            cls.__init__.__signature__ = _signature_with_inherited(cls)

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
        max_raw_t: float = 1.0,
        min_raw_t: float = 0.0,
        use_fp64: bool = False,
    ):
        for name, value in {'num_train_timesteps': num_train_timesteps, 'shift': shift}.items():
            if value <= 0:
                raise ValueError(f'{name}={value}: expected a positive number')
        if dynamic_shifting_type not in ('exp', 'sqrt'):
            raise ValueError(f"dynamic_shifting_type={dynamic_shifting_type!r}: expected 'exp' or 'sqrt'")
        if not 0 <= min_raw_t < max_raw_t <= 1:
            raise ValueError(f'min_raw_t={min_raw_t}, max_raw_t={max_raw_t}: expected 0 <= min_raw_t < max_raw_t <= 1')
        self.num_inference_steps: int | None = None
        self.sigmas = torch.ones(1)
        self.timesteps = torch.full((1,), float(num_train_timesteps))
        self.levels: list[float] = [1.0]
        self._step_index: int | None = None
        self._begin_index: int | None = None

    @classmethod
    def num_function_evaluations(cls, num_inference_steps: int) -> int:
        """Model evaluations, hence timesteps, of a number of solver steps."""
        return num_inference_steps

    @property
    def step_index(self) -> int | None:
        """Index of the next timestep; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Index of the first timestep, where a pipeline does not begin at the first noise level."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin at another timestep than the first, as image-to-image pipelines do."""
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

    def _noise_levels(self, raw: Tensor, shift: float) -> Tensor:
        """Noise levels at which the steps begin."""
        return warp(raw, shift).clamp(max=1)  # rounding may exceed pure noise, where 1 - sigma has roots and logarithms

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        seq_len: int | None = None,
    ) -> None:
        """Lay out the grid of noise levels.

        Args:
            num_inference_steps: Number of steps; may be left out if ``sigmas`` is given.
            device: Device of ``timesteps``.
            sigmas: Schedule times (before the shift) at which the steps begin, decreasing in (0, 1].
            mu: Logarithm of the shift under dynamic shifting, as the pipelines of diffusers compute it; without
                dynamic shifting it has no effect, as in diffusers.
            seq_len: Latent pixels of a sample, for dynamic shifting without ``mu``.

        Raises:
            ValueError: Neither or inconsistent numbers of steps are given, the schedule times are not decreasing, or
                dynamic shifting lacks a length.
        """
        if sigmas is None:
            if num_inference_steps is None or num_inference_steps < 1:
                raise ValueError(f'num_inference_steps={num_inference_steps}: expected a positive number, or sigmas')
            raw = self._raw_grid(num_inference_steps)
        else:
            raw = torch.as_tensor(sigmas, dtype=torch.float64, device='cpu')
            if num_inference_steps is not None and num_inference_steps != len(raw):
                raise ValueError(f'{len(raw)} sigmas were given for num_inference_steps={num_inference_steps}')
            if len(raw) == 0 or not (raw[0] <= 1 and raw[-1] > 0 and (raw.diff() < 0).all()):
                raise ValueError(f'sigmas={raw.tolist()}: expected decreasing schedule times in (0, 1]')
        self.num_inference_steps = len(raw)
        by_mu = self.config.use_dynamic_shifting and mu is not None
        levels = self._noise_levels(raw, math.exp(mu) if by_mu else self.get_shift(seq_len))
        self._set_levels(torch.cat([levels, levels.new_zeros(1)]), device)

    def _set_levels(self, levels: Tensor, device: torch.device | str | None) -> None:
        """Take over the noise levels between which the steps go, (num_steps + 1,), float64, on the host."""
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
                distances = [abs(level - sigma) for level in self.levels[:-1]]
                self._step_index = max(i for i, distance in enumerate(distances) if distance == min(distances))
        if self._step_index >= len(self.levels) - 1:
            raise ValueError(f'all {len(self.levels) - 1} steps were taken; call set_timesteps before sampling again')
        index = self._step_index
        self._step_index += 1
        return index

    def noise_scale(self, step_index: int) -> float:
        """Factor of the fresh noise in a step; 0 where the step is deterministic, so that nothing need be drawn."""
        return 0.0

    def random_arguments(self, step_index: int, source: RandomSource, sample: Tensor) -> dict[str, Any]:
        """Arguments that make a step draw from a source: ``noise`` under the name ``step_noise``, where any is needed.

        Args:
            step_index: Index of the step.
            source: Source of the draw.
            sample: State, (B, C, *), whose shape, dtype and device the noise takes.
        """
        if self.noise_scale(step_index) == 0:
            return {}
        return {'noise': source.normal('step_noise', sample.shape, sample.dtype, sample.device)}

    def _finish(self, index, state, dtype, noise, generator, return_dict) -> FlowSchedulerOutput | tuple[Tensor]:
        """Add the fresh noise of a step and return its result."""
        scale = self.noise_scale(index)
        if scale > 0:
            if noise is None:
                noise = randn_tensor(state.shape, generator=generator, device=state.device, dtype=state.dtype)
            state = state + scale * noise
        state = state.to(dtype)
        return FlowSchedulerOutput(prev_sample=state) if return_dict else (state,)

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """What the model is given: the state as it is."""
        return sample

    def scale_noise(self, sample: Tensor, timestep: float | Tensor, noise: Tensor) -> Tensor:
        """Diffuse clean latents to a timestep: ``(1 - sigma) * sample + sigma * noise``."""
        sigma = torch.as_tensor(timestep, dtype=sample.dtype, device=sample.device) / self.config.num_train_timesteps
        sigma = sigma.reshape(-1, *([1] * (sample.dim() - 1)))
        return (1 - sigma) * sample + sigma * noise

    def __len__(self) -> int:
        return self.config.num_train_timesteps


class VelocityScheduler(FlowScheduler):
    """A flow scheduler whose steps follow a model's velocity; a subclass implements ``_advance``.

    Args:
        terminal_sigma: Stretch the grid so that its last step begins at this noise level.
        **kwargs: Arguments of :class:`FlowScheduler`.

    Raises:
        ValueError: ``terminal_sigma`` is out of range.
    """

    @register_to_config
    def __init__(self, *, terminal_sigma: float | None = None, **kwargs):
        super().__init__(**kwargs)
        if terminal_sigma is not None and not 0 <= terminal_sigma < 1:
            raise ValueError(f'terminal_sigma={terminal_sigma}: expected None or a number from 0 up to, but not, 1')

    def _noise_levels(self, raw: Tensor, shift: float) -> Tensor:
        levels = super()._noise_levels(raw, shift)
        if self.config.terminal_sigma and len(levels) > 1:
            return stretch_to_terminal(levels, self.config.terminal_sigma)
        return levels

    def _advance(self, index: int, u: Tensor, sample: Tensor, generator) -> Tensor:
        """State after a step without its fresh noise.

        Args:
            index: Index of the step.
            u: Velocity at ``sample``, same shape, float32 or wider.
            sample: State, (B, C, *).
            generator: Generator of what the step draws itself.
        """
        raise NotImplementedError(f'{type(self).__name__} does not say how it takes a step')

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        prediction_type: str = 'u',
        noise: Tensor | None = None,
    ) -> FlowSchedulerOutput | tuple[Tensor]:
        """Take one step, computed in float32 or the wider dtype of ``sample``.

        Args:
            model_output: Prediction at ``sample``, same shape.
            timestep: Where the step begins.
            sample: State, (B, C, *).
            generator: Generator of the fresh noise, or one per sample; torch's global one if left out.
            return_dict: Return an output object instead of a tuple.
            prediction_type: What ``model_output`` is: ``'u'`` (velocity) or ``'x0'``.
            noise: The fresh noise itself, same shape as ``sample``; drawn if left out.

        Returns:
            The state at the next noise level, in the dtype of ``sample``.

        Raises:
            ValueError: All steps were taken, or an unknown ``prediction_type``.
        """
        index = self._next_step(timestep)
        x = sample.to(torch.promote_types(sample.dtype, torch.float32))
        u = velocity_from(model_output.to(x.dtype), x, self.levels[index], prediction_type)
        return self._finish(index, self._advance(index, u, x, generator), sample.dtype, noise, generator, return_dict)


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


def remaining_noise_ratio(sigma: float, sigma_to: float, h: float) -> float:
    """Share ``m`` of the present noise that survives a stochastic step; the rest is fresh.

    ``m = ((sigma_to alpha) / (sigma alpha_to)) ** (h ** 2)``: ``h = 0`` keeps all of it (the ODE), ``h = 1`` is the SDE
    of the forward process, ``h = inf`` replaces all of it.

    Args:
        sigma: Noise level of the state, in (0, 1].
        sigma_to: Noise level after the step, below ``sigma``.
        h: Non-negative, may be infinite.
    """
    if h == 0:
        return 1.0
    if h == float('inf'):
        return 0.0
    return (sigma_to * (1 - sigma) / (sigma * (1 - sigma_to))) ** (h * h)
