"""Stochastic sampling of a flow, from the ODE to full re-noising."""

from __future__ import annotations

import math

from diffusers.configuration_utils import register_to_config
from torch import Tensor

from lakonlab.models.diffusions.schedulers.base import VelocityScheduler, remaining_noise_ratio
from lakonlab.models.diffusions.schedulers.h_expression import noise_amount


class FlowSDEScheduler(VelocityScheduler):
    """Steps of the SDE that shares its marginals with the flow and replaces noise by fresh noise at a rate given by h.

    ``'canonical'``: predict ``x_0`` and the noise, keep a share ``m`` of the noise and replace the rest:
    ``x_to = alpha_to * x_0 + sigma_to * (m * noise + sqrt(1 - m^2) * fresh)``, with ``m`` of
    :func:`~lakonlab.models.diffusions.schedulers.base.remaining_noise_ratio`. For finite ``h`` the samples converge to
    the data as the steps grow; with ``'inf'`` they do not, because the predicted ``x_0`` is a mean (a flow map, which
    predicts a sample, can be re-noised: :class:`~lakonlab.models.diffusions.schedulers.FlowMapSDEScheduler`).

    ``'euler-maruyama'``: the same to first order in the step, ``dx = (u + r * noise) dsigma + sqrt(2 r sigma) dw`` with
    ``r = h^2 / alpha``. At pure noise, where that rate is infinite, it is taken as 1 (any rate keeps the marginal). It
    needs steps with ``h^2 * (sigma - sigma_to)`` well below ``alpha``. The last step adds no noise.

    Args:
        h: Amount of noise at the start of a step: 0 the ODE, 1 the SDE of the forward process, ``'inf'`` re-noising,
            or an expression in ``sigma``, see :func:`~lakonlab.models.diffusions.schedulers.h_expression.noise_amount`.
        solver_type: ``'canonical'`` or ``'euler-maruyama'``.
        **kwargs: Arguments of :class:`~lakonlab.models.diffusions.schedulers.base.VelocityScheduler`.

    Raises:
        ValueError: ``solver_type`` is unknown, ``h`` is not understood or, for Euler-Maruyama, infinite.
    """

    @register_to_config
    def __init__(self, *, h: float | str = 1.0, solver_type: str = 'canonical', **kwargs):
        super().__init__(**kwargs)
        if solver_type not in ('canonical', 'euler-maruyama'):
            raise ValueError(f"solver_type={solver_type!r}: expected 'canonical' or 'euler-maruyama'")
        self.noise_amount = noise_amount(h)
        if solver_type == 'euler-maruyama' and math.isinf(self.noise_amount(0.5)):
            raise ValueError(f"h={h!r}: solver_type='euler-maruyama' needs a finite amount of noise")

    def _ratio(self, index: int) -> float:
        sigma = self.levels[index]
        return remaining_noise_ratio(sigma, self.levels[index + 1], self.noise_amount(sigma))

    def _rate(self, index: int) -> float:
        """Rate at which Euler-Maruyama replaces noise, per unit of noise level, times sigma."""
        sigma = self.levels[index]
        h = self.noise_amount(sigma)
        if h == 0:
            return 0.0
        return h * h / (1 - sigma) if sigma < 1 else 1.0

    def noise_scale(self, step_index: int) -> float:
        sigma, sigma_to = self.levels[step_index], self.levels[step_index + 1]
        if self.config.solver_type == 'canonical':
            return sigma_to * (1 - self._ratio(step_index) ** 2) ** 0.5
        if sigma_to == 0:
            return 0.0
        return (2 * self._rate(step_index) * sigma * (sigma - sigma_to)) ** 0.5

    def _advance(self, index: int, u: Tensor, sample: Tensor, generator) -> Tensor:
        sigma, sigma_to = self.levels[index], self.levels[index + 1]
        if self.config.solver_type == 'canonical':
            x_0, noise = sample - sigma * u, sample + (1 - sigma) * u
            return (1 - sigma_to) * x_0 + (sigma_to * self._ratio(index)) * noise
        h = self.noise_amount(sigma)
        # rate * noise = rate * sample + h^2 * u, which needs no division by alpha in the second term
        return sample + (sigma_to - sigma) * (self._rate(index) * sample + (1 + h * h) * u)
