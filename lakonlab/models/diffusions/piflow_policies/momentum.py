"""The momentum policy: a mixture of velocity modes that decay exponentially (momentum modes after arXiv 2602.09014).

With ``tau = sigma_src - sigma_t``, the distance in noise level that the state has come from the source,

    u(sigma_t) = sum_k w_k v_k exp(-decay_k tau)

whatever the state is. A displacement is therefore a weighted sum of the ``w_k v_k`` whose K weights per sample need no
pixel to be looked at: summed over the Euler substeps of length ``h_j`` they are ``sum_j h_j exp(-decay_k tau_j)``, and
integrated from ``tau_a`` to ``tau_b`` they are ``-exp(-decay_k tau_a) (tau_b - tau_a) phi(-decay_k (tau_b - tau_a))``
with ``phi(z) = (exp(z) - 1) / z``.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor

from lakonlab.models.diffusions.piflow_policies.base import Policy
from lakonlab.ops.mixture import drop_components
from lakonlab.ops.random_source import RandomSource
from lakonlab.ops.rollout_schedule import RolloutSchedule


class MomentumPolicy(Policy):
    """Velocity that depends on time alone, as a mixture of K modes of exponential decay.

    Args:
        denoising_output: ``velocities`` (B, K, C, *) of the modes at the source; ``logweights`` (B, K, 1, *), their
            logarithmic weights up to a constant; ``decays`` (B, K, 1, *1), rates per unit of noise level: 0 for a
            constant velocity, negative for one that grows on the way to the data.
        x_t_src: State that the network saw, (B, C, *).
        sigma_t_src: Its noise level in (0, 1], (B,) or (B, 1, *1).
        exact: Roll out by the exact integral instead of the sum over Euler substeps, which it equals in the limit of
            many substeps.
        eps: Floor of the temperature; no noise level divides.

    Raises:
        ValueError: A tensor of the output is missing or of the wrong shape.
    """

    def __init__(
        self,
        denoising_output: dict[str, Tensor],
        x_t_src: Tensor,
        sigma_t_src: Tensor,
        exact: bool = False,
        eps: float = 1e-4,
    ):
        super().__init__(x_t_src, sigma_t_src, eps)
        missing = {'velocities', 'logweights', 'decays'} - set(denoising_output)
        if missing:
            raise ValueError(
                f'the network output lacks {sorted(missing)}; the momentum policy needs a mixture of modes'
            )
        num_modes = denoising_output['velocities'].shape[1]
        for name, shape in self.output_shapes(tuple(x_t_src.shape), num_modes).items():
            if denoising_output[name].shape != shape:
                raise ValueError(
                    f'{name} have shape {tuple(denoising_output[name].shape)}, expected {shape} for {num_modes} modes '
                    f'and a state of shape {tuple(x_t_src.shape)}'
                )
        self.velocities, self.logweights, self.decays = (
            denoising_output[name].to(x_t_src.dtype) for name in ('velocities', 'logweights', 'decays')
        )
        self.weighted = self.logweights.softmax(dim=1) * self.velocities
        self.exact = exact

    @classmethod
    def output_shapes(cls, state_shape: tuple[int, ...], num_components: int) -> dict[str, tuple[int, ...]]:
        batch_size, _, *size = state_shape
        return {
            'velocities': (batch_size, num_components, *state_shape[1:]),
            'logweights': (batch_size, num_components, 1, *size),
            'decays': (batch_size, num_components, 1, *[1] * len(size)),
        }

    def _decay(self, sigmas: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Decay ``exp(-decay_k tau)`` at noise levels (B, n), shape (B, n, K), in wide precision; the rates (B, 1, K)
        and the noise levels (B, n) it was made from."""
        sigma_src, sigmas, decays = self._wide(self.sigma_t_src, sigmas, self.decays.flatten(1))
        tau = sigma_src[:, None] - sigmas
        return (-decays[:, None] * tau[..., None]).exp(), decays[:, None], sigmas

    def _combine(self, factors: Tensor) -> Tensor:
        """``sum_k factors_k w_k v_k`` for factors (B, K)."""
        combined = torch.bmm(factors.to(self.weighted.dtype)[:, None], self.weighted.flatten(2))
        return combined.reshape(self.x_t_src.shape)

    def pi(self, x_t: Tensor, sigma_t: Tensor) -> Tensor:
        decay, _, _ = self._decay(sigma_t.reshape(-1, 1))
        return self._combine(decay[:, 0])

    def rollout(self, x_start: Tensor, schedule: RolloutSchedule) -> Tensor:
        """All substeps in one contraction over the modes; with ``exact``, the integral from first to last noise level.

        Args:
            x_start: State at the first noise level of the schedule, (B, C, *).
            schedule: Noise levels of the substeps; with ``exact`` only the first and last matter.

        Returns:
            State at the end of the schedule, (B, C, *).
        """
        if self.exact:
            decay, rates, sigmas = self._decay(schedule.sigmas[:, :1])
            step = schedule.sigmas[:, -1:].to(sigmas) - sigmas
            factors = (step[..., None] * decay * _mean_exponential(rates * step[..., None]))[:, 0]
        else:
            decay, _, _ = self._decay(schedule.sigmas[:, :-1])
            factors = (schedule.sigmas.diff(dim=1).to(decay)[..., None] * decay).sum(dim=1)
        return x_start + self._combine(factors)

    def _replaced(self, **changes: Tensor) -> MomentumPolicy:
        policy = copy.copy(self)
        policy.__dict__.update(changes)
        return policy

    def _reweighted(self, logweights: Tensor) -> MomentumPolicy:
        return self._replaced(logweights=logweights, weighted=logweights.softmax(dim=1) * self.velocities)

    def detach(self) -> MomentumPolicy:
        names = ('x_t_src', 'velocities', 'logweights', 'decays', 'weighted')
        return self._replaced(**{name: getattr(self, name).detach() for name in names})

    def temperature(self, temperature: float) -> MomentumPolicy:
        """Sharpen the weights to the power ``1 / temperature``; no effect from 1 on."""
        if temperature >= 1:
            return self
        return self._reweighted((self.logweights / max(temperature, self.eps)).log_softmax(dim=1))

    def dropout(self, probability: float, source: RandomSource) -> MomentumPolicy:
        """Drop whole modes of each sample with the given probability, never all of them."""
        if probability <= 0:
            return self
        uniform = source.uniform('dropout', self.decays.shape, device=self.decays.device)
        return self._reweighted(drop_components(self.logweights, uniform, probability))


def _mean_exponential(z: Tensor) -> Tensor:
    """``phi(z) = (exp(z) - 1) / z``, the mean of ``exp`` from 0 to ``z``, and its derivative, exact also at 0."""
    is_small = z.abs() < 1e-2
    series = sum(z**n / math.factorial(n + 1) for n in range(8))
    away = torch.where(is_small, torch.ones_like(z), z)
    return torch.where(is_small, series, torch.expm1(away) / away)
