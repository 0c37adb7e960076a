"""The GMFlow policy: a Gaussian mixture per pixel, whose posterior mean is the velocity (pi-Flow, section 3.2)."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from lakonlab.models.diffusions.piflow_policies.base import Policy
from lakonlab.ops.mixture import PosteriorCoefficients, drop_components, posterior_coefficients, posterior_velocity
from lakonlab.ops.mixture_rollout import mixture_rollout, substep_coefficients
from lakonlab.ops.random_source import RandomSource
from lakonlab.ops.rollout_schedule import RolloutSchedule
from lakonlab.ops.shapes import expand_like


class GMFlowPolicy(Policy):
    """Velocity of a Gaussian mixture with K components per pixel and one standard deviation per sample.

    Args:
        denoising_output: The mixture in velocity space: ``means`` (B, K, C, *), ``logweights`` (B, K, 1, *),
            ``logstds`` (B, 1, 1, *1).
        x_t_src: State that the network saw, (B, C, *).
        sigma_t_src: Its noise level in (0, 1], (B,) or (B, 1, *1).
        checkpointing: Of published configs; has no effect, since a rollout's gradient never keeps more than its inputs.
        eps: Floor of the noise levels and of the temperature.
        rollout_backend: What computes rollouts, see :func:`lakonlab.ops.mixture_rollout.mixture_rollout`.

    Raises:
        ValueError: A tensor of the output is missing or of the wrong shape.
    """

    def __init__(
        self,
        denoising_output: dict[str, Tensor],
        x_t_src: Tensor,
        sigma_t_src: Tensor,
        checkpointing: bool = True,
        eps: float = 1e-6,
        rollout_backend: str = 'auto',
    ):
        super().__init__(x_t_src, sigma_t_src, eps)
        missing = {'means', 'logweights', 'logstds'} - set(denoising_output)
        if missing:
            raise ValueError(f'the network output lacks {sorted(missing)}; the GMFlow policy needs a Gaussian mixture')
        self.means, self.logweights, logstds = (
            denoising_output[key].to(x_t_src.dtype) for key in ('means', 'logweights', 'logstds')
        )
        if self.means.shape[:1] + self.means.shape[2:] != x_t_src.shape:
            raise ValueError(
                f'means have shape {tuple(self.means.shape)}, expected (B, K, C, *) for a state (B, C, *) of shape '
                f'{tuple(x_t_src.shape)}'
            )
        self.variance = (2 * logstds.reshape(-1).to(self.wide_dtype)).exp()
        # constant along the whole segment
        self.squared_norms = self.means.to(self.wide_dtype).square().sum(dim=2, keepdim=True)
        self.rollout_backend = rollout_backend

    @classmethod
    def output_shapes(cls, state_shape: tuple[int, ...], num_components: int) -> dict[str, tuple[int, ...]]:
        batch_size, _, *size = state_shape
        return {
            'means': (batch_size, num_components, *state_shape[1:]),
            'logweights': (batch_size, num_components, 1, *size),
            'logstds': (batch_size, 1, 1, *[1] * len(size)),
        }

    @property
    def wide_dtype(self) -> torch.dtype:
        """Of the arithmetic: factors and squared norms may exceed 65504, the largest half-precision number."""
        return torch.promote_types(self.x_t_src.dtype, torch.float32)

    def x_0_mixture(self) -> dict[str, Tensor]:
        """The mixture over clean latents: ``means`` (B, K, C, *), ``logweights``, and ``variances`` (B, 1, 1, *1)."""
        sigma = self.sigma_t_src.to(self.means).reshape(-1, *([1] * (self.means.dim() - 1)))
        return {
            'means': self.x_t_src.unsqueeze(1) - sigma * self.means,
            'logweights': self.logweights,
            'variances': sigma.square() * self.variance.reshape(sigma.shape),
        }

    def pi(self, x_t: Tensor, sigma_t: Tensor) -> Tensor:
        dtype = self.wide_dtype
        x = self.x_t_src.to(dtype)
        wide = self._wide(self.sigma_t_src, sigma_t.reshape(-1), self.variance)
        sigma_src, sigma_t, variance = (expand_like(value, x, dtype=value.dtype) for value in wide)
        coefficients = posterior_coefficients(sigma_src.clamp(min=self.eps), sigma_t.clamp(min=self.eps), variance)
        coefficients = PosteriorCoefficients(*(c.to(dtype) for c in coefficients))
        means, logweights = self.means.to(dtype), self.logweights.to(dtype)
        u = posterior_velocity(means, logweights, self.squared_norms, x, x_t.to(dtype) - x, coefficients)
        return u.to(x_t.dtype)

    def rollout(self, x_start: Tensor, schedule: RolloutSchedule) -> Tensor:
        """Euler substeps of the offset from the source, which is what the coefficients multiply, in one operation."""
        sigma_src, sigmas, variance = self._wide(self.sigma_t_src, schedule.sigmas, self.variance)
        offset = mixture_rollout(
            self.means,
            self.logweights,
            self.x_t_src,
            x_start - self.x_t_src,
            substep_coefficients(sigmas, sigma_src, variance, self.eps),
            schedule.counts.clamp(min=1),
            self.rollout_backend,
        )
        return self.x_t_src + offset

    def _replaced(self, **changes) -> GMFlowPolicy:
        policy = copy.copy(self)
        policy.__dict__.update(changes)
        return policy

    def detach(self) -> GMFlowPolicy:
        return self._replaced(
            x_t_src=self.x_t_src.detach(),
            means=self.means.detach(),
            logweights=self.logweights.detach(),
            variance=self.variance.detach(),
            squared_norms=self.squared_norms.detach(),
        )

    def temperature(self, temperature: float) -> GMFlowPolicy:
        """Sharpen the weights to the power ``1 / temperature`` and scale the variance by it; no effect from 1 on."""
        if temperature >= 1:
            return self
        temperature = max(temperature, self.eps)
        return self._replaced(
            logweights=(self.logweights / temperature).log_softmax(dim=1), variance=self.variance * temperature
        )

    def dropout(self, probability: float, source: RandomSource) -> GMFlowPolicy:
        """Drop whole components of each sample with the given probability, never all of them."""
        if probability <= 0:
            return self
        shape = (*self.means.shape[:2], *([1] * (self.means.dim() - 2)))
        uniform = source.uniform('dropout', shape, device=self.means.device)
        return self._replaced(logweights=drop_components(self.logweights, uniform, probability))
