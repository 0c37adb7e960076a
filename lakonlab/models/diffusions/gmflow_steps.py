"""The mathematics of GMFlow's loss and samplers (Chen et al., "Gaussian Mixture Flow Matching Models", 2025).

Mixtures are those of :mod:`lakonlab.ops.isotropic_mixture`; states are (B, C, H, W), or (B, T, C, H, W) for videos with
the frame before the channel; noise levels broadcast against states.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lakonlab.models.diffusions.guidance import remove_parallel
from lakonlab.ops.isotropic_mixture import (
    GaussianMixture,
    IsotropicGaussian,
    isotropic_gaussian,
    mixture_mean,
    reshape_gaussian,
)

FLOOR = 1e-6
TINY = 1e-30  # where 0 divided by 0 is to be 0, and the unit of length must not matter


def x_0_mixture(mixture: GaussianMixture, x_t: Tensor, sigma_t: Tensor) -> GaussianMixture:
    """The mixture over clean data that a mixture over velocities at ``x_t`` stands for: ``x_0 = x_t - sigma_t u``."""
    sigma = sigma_t.unsqueeze(-4)
    return GaussianMixture(
        x_t.unsqueeze(-4) - sigma * mixture.means,
        mixture.logweights,
        mixture.logstds + sigma.clamp(min=FLOOR).log(),
    )


@dataclass(frozen=True)
class ReverseTransition:
    """``p(x_low | x_high, x_0) = N(from_state * x_high + from_x_0 * x_0, variance)`` of the flow's forward process.

    With ``r = sigma_low / sigma_high``, ``q = alpha_high / alpha_low`` and ``b = 1 - (r q)^2`` the factors are
    ``r^2 q``, ``b alpha_low`` and ``b sigma_low^2`` (GMFlow, section 3.2).
    """

    from_state: Tensor
    from_x_0: Tensor
    variance: Tensor

    @classmethod
    def between(cls, sigma_high: Tensor, sigma_low: Tensor) -> ReverseTransition:
        """The transition from one noise level down to another."""
        alpha_low = 1 - sigma_low
        r = sigma_low / sigma_high.clamp(min=FLOOR)
        q = (1 - sigma_high) / alpha_low.clamp(min=FLOOR)
        b = 1 - (r * q).square()
        return cls(r.square() * q, b * alpha_low, b * sigma_low.square())

    def of_mixture(self, x_high: Tensor, x_0: GaussianMixture) -> GaussianMixture:
        """``p(x_low | x_high)`` for a mixture over ``x_0``."""
        from_state, from_x_0, variance = (
            tensor.unsqueeze(-4) for tensor in (self.from_state, self.from_x_0, self.variance)
        )
        logvariance = torch.logaddexp(
            2 * (x_0.logstds + from_x_0.clamp(min=FLOOR).log()), variance.clamp(min=FLOOR).log()
        )
        means = from_state * x_high.unsqueeze(-4) + from_x_0 * x_0.means
        return GaussianMixture(means, x_0.logweights, 0.5 * logvariance)

    def of_point(self, x_high: Tensor, x_0: Tensor, noise: Tensor) -> Tensor:
        """A sample of ``x_low`` for a known ``x_0``."""
        return self.from_state * x_high + self.from_x_0 * x_0 + self.variance.sqrt() * noise


def posterior_mixture(
    prior: GaussianMixture, x_src: Tensor, sigma_src: Tensor, x_t: Tensor, sigma_t: Tensor, eps: float = FLOOR
) -> GaussianMixture:
    """What a mixture over ``x_0``, predicted at the state ``x_src``, becomes when a later state ``x_t`` is known.

    Args:
        prior: ``p(x_0 | x_src)``.
        x_src: State at which it was predicted.
        sigma_src: Its noise level.
        x_t: Later state.
        sigma_t: Its noise level, at most ``sigma_src``.
        eps: Floor of noise levels and of the ratio of variances.
    """
    sigma_src, sigma_t = (sigma.clamp(min=eps) for sigma in (sigma_src, sigma_t))
    ratio_src, ratio_t = (1 - sigma_src) / sigma_src, (1 - sigma_t) / sigma_t
    zeta = (ratio_t.square() - ratio_src.square()).unsqueeze(-4)
    nu = (ratio_t * x_t / sigma_t - ratio_src * x_src / sigma_src).unsqueeze(-4)
    variance = (2 * prior.logstds).exp()
    d = (variance * zeta + 1).clamp(min=eps)
    evidence = (prior.means * (nu - 0.5 * zeta * prior.means)).sum(dim=-3, keepdim=True)
    return GaussianMixture(
        (variance * nu + prior.means) / d,
        (prior.logweights + evidence / d).log_softmax(dim=-4),
        prior.logstds - 0.5 * d.log(),
    )


@dataclass(frozen=True)
class GuidedMixture:
    """A conditional mixture, its Gaussian with one variance per sample, and the mixture after guidance."""

    conditional: GaussianMixture
    gaussian: IsotropicGaussian
    mixture: GaussianMixture
    shift: Tensor
    """What guidance added to the mean of the Gaussian; 0 without guidance."""
    weight: Tensor
    """Active guidance scale of each sample, (B, 1, ...)."""


def per_sample_gaussian(mixture: GaussianMixture) -> IsotropicGaussian:
    """The isotropic Gaussian per pixel with the variance averaged over everything but the batch."""
    mean, variance = isotropic_gaussian(mixture)
    return IsotropicGaussian(mean, _average(variance))


def guide(
    conditional: GaussianMixture,
    negative: GaussianMixture | None,
    weight: Tensor,
    orthogonal: float,
    axis: Tensor | None = None,
) -> GuidedMixture:
    """Probabilistic guidance (GMFlow, section 3.4): move and narrow the Gaussian of the prediction.

    The Gaussian ``N(m, v)`` of the conditional mixture becomes ``N(m + shift, (1 - w^2) v)``, where the shift points
    away from the negative mean and has the power ``w^2 v``; the mixture is multiplied by the quotient of the two.

    Args:
        conditional: Mixture under the condition.
        negative: Mixture under the negative condition; None for no guidance.
        weight: Guidance scale w in [0, 1) of each sample, (B, 1, ...); 0 leaves the mixture as it is.
        orthogonal: Share of the shift along ``axis`` that is removed before it is scaled.
        axis: Direction of that share, like a state; by default the mean of the conditional mixture.
    """
    gaussian = per_sample_gaussian(conditional)
    if negative is None:
        return GuidedMixture(conditional, gaussian, conditional, torch.zeros_like(gaussian.mean), weight)
    shift = gaussian.mean - mixture_mean(negative)
    if orthogonal:
        shift = remove_parallel(shift, gaussian.mean if axis is None else axis, orthogonal)
    shift = shift * (weight * (gaussian.variance / _power(shift).clamp(min=TINY)).sqrt())
    mixture = reshape_gaussian(conditional, gaussian, shift, weight.square())
    return GuidedMixture(conditional, gaussian, mixture, shift, weight)


def correct_second_order(
    guided: GuidedMixture,
    extrapolated: Tensor,
    step: float,
    previous_step: float,
    coefficients: tuple[float, float] = (0.005, 1.0),
    correction_steps: int = 0,
) -> GaussianMixture:
    """Second-order correction of the mixture of a step (GMFlow, section 3.3 and algorithm 1: GM-ODE 2 and GM-SDE 2).

    The mean is moved by what it gained over the previous step's mixture, so that it stands for the middle of the step;
    like guidance, the move is taken by a Gaussian whose variance shrinks by the power of the move.

    Args:
        guided: The prediction of this step.
        extrapolated: ``E[x_0 | x_t]`` under the mixture of the previous step.
        step: Length of this step in noise level.
        previous_step: Length of the previous one.
        coefficients: How much of the variance, by itself and under guidance, is taken for uncertainty of the gain.
        correction_steps: Fixed-point iterations after which the mean of the mixture itself has moved as intended.
    """
    mean, variance = guided.gaussian
    target = mixture_mean(guided.mixture)
    own, under_guidance = coefficients
    uncertainty = variance * ((guided.weight * under_guidance).square() + own) / previous_step**2
    gain = (target - extrapolated) * (step / (2 * previous_step)) * (1 - uncertainty).clamp(min=0).sqrt()

    def reshaped(shift: Tensor) -> tuple[Tensor, GaussianMixture]:
        power = _power(shift)
        shift = shift * (variance / power.clamp(min=TINY)).clamp(max=1).sqrt()
        shrinkage = (power / variance.clamp(min=TINY)).clamp(max=1 - FLOOR)
        return shift, reshape_gaussian(guided.conditional, guided.gaussian, shift, shrinkage)

    shift, mixture = reshaped(gain + guided.shift)
    for _ in range(correction_steps):
        moved = mixture_mean(mixture) - mean
        error = moved - (gain + target - mean)
        relative = shift.norm(dim=-3, keepdim=True) / moved.norm(dim=-3, keepdim=True).clamp(min=TINY)
        shift, mixture = reshaped(shift - error * relative.clamp(max=1))
    return mixture


def _average(values: Tensor) -> Tensor:
    return values.mean(dim=tuple(range(1, values.dim())), keepdim=True)


def _power(values: Tensor) -> Tensor:
    return _average(values.square())
