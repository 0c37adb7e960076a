"""The GMFlow policy: a Gaussian mixture per pixel, whose posterior mean is the velocity (pi-Flow, section 3.2)."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lakonlab.models.diffusions.piflow_policies.base import Policy
from lakonlab.ops.mixture import PosteriorCoefficients, drop_components, posterior_coefficients, posterior_velocity
from lakonlab.ops.random_source import RandomSource
from lakonlab.ops.rollout_schedule import RolloutSchedule


class GMFlowPolicy(Policy):
    """Velocity of a Gaussian mixture with K components per pixel and one standard deviation per sample.

    Args:
        denoising_output: The mixture in velocity space: ``means`` (B, K, C, *), ``logweights`` (B, K, 1, *),
            ``logstds`` (B, 1, 1, *1).
        x_t_src: State that the network saw, (B, C, *).
        sigma_t_src: Its noise level in (0, 1], (B,) or (B, 1, *1).
        checkpointing: Recompute each substep in the backward pass instead of keeping its intermediate results.
        eps: Floor of the noise levels and of the temperature.

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
        self.variance = (2 * logstds.reshape(-1)).exp()
        self.squared_norms = self.means.square().sum(dim=2, keepdim=True)  # constant along the whole segment
        self.checkpointing = checkpointing

    def x_0_mixture(self) -> dict[str, Tensor]:
        """The mixture over clean latents: ``means`` (B, K, C, *), ``logweights``, and ``variances`` (B, 1, 1, *1)."""
        sigma = self.sigma_t_src.to(self.means).reshape(-1, *([1] * (self.means.dim() - 1)))
        return {
            'means': self.x_t_src.unsqueeze(1) - sigma * self.means,
            'logweights': self.logweights,
            'variances': sigma.square() * self.variance.reshape(sigma.shape),
        }

    def _coefficients(self, sigmas: Tensor) -> list[PosteriorCoefficients]:
        """Coefficients at noise levels (B, n), one entry per noise level, each of shape (B, 1, *1)."""
        x = self.x_t_src
        # These are a few numbers per sample: double precision costs nothing and keeps 1 - sigma_t / sigma_src exact.
        wide = torch.float32 if x.device.type == 'mps' else torch.float64
        sigma_src, sigma_t = (
            sigma.to(device=x.device, dtype=wide).clamp(min=self.eps) for sigma in (self.sigma_t_src[:, None], sigmas)
        )
        coefficients = posterior_coefficients(sigma_src, sigma_t, self.variance[:, None].to(wide))
        columns = [_per_sample(c.to(x.dtype), x).unbind(1) for c in coefficients]
        return [PosteriorCoefficients(*column) for column in zip(*columns)]

    def _velocity(self, offset: Tensor, coefficients: PosteriorCoefficients) -> Tensor:
        return posterior_velocity(self.means, self.logweights, self.squared_norms, self.x_t_src, offset, coefficients)

    def pi(self, x_t: Tensor, sigma_t: Tensor) -> Tensor:
        return self._velocity(x_t - self.x_t_src, self._coefficients(sigma_t.reshape(-1, 1))[0])

    def rollout(self, x_start: Tensor, schedule: RolloutSchedule) -> Tensor:
        """Euler substeps of the offset from the source, which is what the coefficients multiply."""
        if not torch.is_grad_enabled():
            return self._rollout_longest_first(x_start, schedule)
        offset = x_start - self.x_t_src
        recompute = self.checkpointing and self.means.requires_grad
        steps = _per_sample(schedule.sigmas.diff(dim=1).to(offset), offset).unbind(1)
        for coefficients, step in zip(self._coefficients(schedule.sigmas[:, :-1]), steps):
            if recompute:
                u = checkpoint(self._velocity, offset, coefficients, use_reentrant=False)
            else:
                u = self._velocity(offset, coefficients)
            offset = torch.addcmul(offset, u, step)
        return self.x_t_src + offset

    def _rollout_longest_first(self, x_start: Tensor, schedule: RolloutSchedule) -> Tensor:
        """The same without gradient: samples in the order of their number of substeps, so that finished ones drop out.

        When lengths are drawn at random, half of the evaluations of the plain loop are of finished samples.
        """
        order = schedule.counts.argsort(descending=True)
        lengths = schedule.counts[order].clamp(min=1).tolist()
        policy = self._rows(order.to(x_start.device))
        offset = x_start[order.to(x_start.device)] - policy.x_t_src
        steps = _per_sample(schedule.sigmas[order].diff(dim=1).to(offset), offset).unbind(1)
        num_active = len(lengths)
        for i, coefficients in enumerate(policy._coefficients(schedule.sigmas[order, :-1])):
            while lengths[num_active - 1] <= i:
                num_active -= 1
            if num_active < len(policy.means):
                policy = policy._rows(slice(num_active))
            active = offset[:num_active]
            u = policy._velocity(active, PosteriorCoefficients(*(c[:num_active] for c in coefficients)))
            active.addcmul_(u, steps[i][:num_active])
        return self.x_t_src + torch.empty_like(offset).index_copy_(0, order.to(offset.device), offset)

    def _rows(self, rows: Tensor | slice) -> GMFlowPolicy:
        names = ('x_t_src', 'means', 'logweights', 'variance', 'squared_norms')
        sigma_t_src = self.sigma_t_src[rows if isinstance(rows, slice) else rows.to(self.sigma_t_src.device)]
        return self._replaced(sigma_t_src=sigma_t_src, **{name: getattr(self, name)[rows] for name in names})

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


def _per_sample(values: Tensor, x: Tensor) -> Tensor:
    """Give numbers (B, n) the singleton dimensions that let a column broadcast against ``x`` (B, C, *)."""
    return values.reshape(*values.shape, *([1] * (x.dim() - 1)))
