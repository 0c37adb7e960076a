"""Mixtures of isotropic Gaussians, one per pixel, and what can be done with them in closed form.

Shapes: K components, C channels; ``*`` are batch dimensions, of which videos have one more (the frame). Components come
four dimensions before the end, so that the same code serves images and videos.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lakonlab.ops.random_source import RandomSource


class GaussianMixture(NamedTuple):
    """Components with weights per pixel, and a standard deviation they share."""

    means: Tensor
    """(*, K, C, H, W)."""
    logweights: Tensor
    """(*, K, 1, H, W), up to a constant per pixel."""
    logstds: Tensor
    """Broadcastable to ``logweights``, usually (*, 1, 1, 1, 1)."""


class IsotropicGaussian(NamedTuple):
    """One Gaussian per pixel with the same variance in all channels."""

    mean: Tensor
    """(*, C, H, W)."""
    variance: Tensor
    """Broadcastable to (*, 1, H, W)."""


def mixture_mean(mixture: GaussianMixture, power: float = 1.0) -> Tensor:
    """Mean (*, C, H, W) of the mixture whose weights are raised to a power and normalised."""
    return ((power * mixture.logweights).softmax(dim=-4) * mixture.means).sum(dim=-4)


def isotropic_gaussian(mixture: GaussianMixture) -> IsotropicGaussian:
    """The isotropic Gaussian with the same mean and the same total variance."""
    weights = mixture.logweights.softmax(dim=-4)
    mean = (weights * mixture.means).sum(dim=-4)
    spread = (mixture.means - mean.unsqueeze(-4)).square().mean(dim=-3, keepdim=True)
    variance = (weights * (spread + (2 * mixture.logstds).exp())).sum(dim=-4)
    return IsotropicGaussian(mean, variance)


def full_gaussian(mixture: GaussianMixture) -> tuple[Tensor, Tensor]:
    """Mean (*, H, W, C) and covariance between channels (*, H, W, C, C) of every pixel."""
    weights = mixture.logweights.softmax(dim=-4)
    mean = (weights * mixture.means).sum(dim=-4)
    deviation = mixture.means - mean.unsqueeze(-4)
    covariance = torch.einsum('...kihw,...kjhw->...hwij', weights * deviation, deviation)
    own = (weights * (2 * mixture.logstds).exp()).sum(dim=-4).movedim(-3, -1)
    identity = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    return mean.movedim(-3, -1), covariance + own.unsqueeze(-1) * identity


def multiply_by_gaussian(
    mixture: GaussianMixture,
    gaussian: IsotropicGaussian,
    mixture_power: float = 1.0,
    gaussian_power: float = 1.0,
    eps: float = 1e-6,
) -> GaussianMixture:
    """The normalised product ``mixture^p * gaussian^q``, written as the p-th power of the mixture that is returned.

    Args:
        mixture: The mixture.
        gaussian: The Gaussian.
        mixture_power: p, positive.
        gaussian_power: q.
        eps: Floor of the sum of variances that divides.
    """
    ratio = gaussian_power / mixture_power
    mean, variance = (tensor.unsqueeze(-4) for tensor in gaussian)
    own = (2 * mixture.logstds).exp()
    total = (variance + ratio * own).clamp(min=eps)
    distance = (mixture.means - mean).square().sum(dim=-3, keepdim=True)
    return GaussianMixture(
        (variance * mixture.means + ratio * own * mean) / total,
        (mixture.logweights - 0.5 * ratio * distance / total).log_softmax(dim=-4),
        mixture.logstds + 0.5 * (variance.log() - total.log()),
    )


def reshape_gaussian(
    mixture: GaussianMixture, gaussian: IsotropicGaussian, shift: Tensor, shrinkage: Tensor
) -> GaussianMixture:
    """The product of a mixture with the quotient of two Gaussians, ``N(m + shift, (1 - c) v) / N(m, v)``.

    Written without the quotient, whose variance ``v (1 - c) / c`` is infinite where nothing is to be changed: with
    ``n = (1 - c) v + c s^2``,

        mean_k -> ((1 - c) v mean_k + s^2 (c m + shift)) / n
        logit_k -> logit_k - (c |mean_k - m|^2 - 2 (mean_k - m) . shift) / (2 n)

    so that no shift and ``c = 0`` is the identity, and small variances lose no digits.

    Args:
        mixture: The mixture, of component variance ``s^2``.
        gaussian: The Gaussian ``N(m, v)`` to be replaced.
        shift: How far its mean moves, (*, C, H, W).
        shrinkage: c in [0, 1), by which its variance shrinks, broadcastable to (*, 1, H, W).
    """
    mean, variance, shift, c = (tensor.unsqueeze(-4) for tensor in (*gaussian, shift, shrinkage))
    own = (2 * mixture.logstds).exp()
    kept = (1 - c) * variance
    total = kept + c * own
    deviation = mixture.means - mean
    exponent = (c * deviation.square() - 2 * deviation * shift).sum(dim=-3, keepdim=True)
    return GaussianMixture(
        (kept * mixture.means + own * (c * mean + shift)) / total,
        (mixture.logweights - 0.5 * exponent / total).log_softmax(dim=-4),
        mixture.logstds + 0.5 * (kept.log() - total.log()),
    )


def multiply_gaussians(
    first: IsotropicGaussian,
    second: IsotropicGaussian,
    first_power: float = 1.0,
    second_power: float = 1.0,
    eps: float = 1e-6,
) -> IsotropicGaussian:
    """The normalised product ``first^p * second^q``; ``q = -1`` is the quotient.

    Args:
        first: A Gaussian.
        second: Another.
        first_power: p.
        second_power: q.
        eps: Floor of the denominator, on which a quotient of nearly equal variances depends.
    """
    denominator = (first_power * second.variance + second_power * first.variance).clamp(min=eps)
    mean = (first_power * second.variance * first.mean + second_power * first.variance * second.mean) / denominator
    return IsotropicGaussian(mean, first.variance * second.variance / denominator)


def multiply_mixtures(first: GaussianMixture, second: GaussianMixture) -> GaussianMixture:
    """The normalised product of two mixtures: all pairs of components, those of ``second`` running fastest."""
    means = [mixture.means.unsqueeze(axis) for mixture, axis in ((first, -4), (second, -5))]
    logweights = [mixture.logweights.unsqueeze(axis) for mixture, axis in ((first, -4), (second, -5))]
    logstds = [mixture.logstds.unsqueeze(axis) for mixture, axis in ((first, -4), (second, -5))]
    variances = [(2 * logstd).exp() for logstd in logstds]
    total = variances[0] + variances[1]
    distance = (means[0] - means[1]).square().sum(dim=-3, keepdim=True)
    num_channels = first.means.shape[-3]
    overlap = -0.5 * distance / total - 0.5 * num_channels * total.log()
    return GaussianMixture(
        ((variances[1] * means[0] + variances[0] * means[1]) / total).flatten(-5, -4),
        (logweights[0] + logweights[1] + overlap).flatten(-5, -4).log_softmax(dim=-4),
        (logstds[0] + logstds[1] - 0.5 * total.log()).flatten(-5, -4),
    )


def log_probability(samples: Tensor, mixture: GaussianMixture) -> tuple[Tensor, Tensor]:
    """Logarithm of the density over all channels of a pixel.

    Args:
        samples: S samples of every pixel, (*, S, C, H, W).
        mixture: The mixture, with normalised ``logweights``.

    Returns:
        The density of the mixture, (*, S, H, W), and of each component without its weight, (*, S, K, H, W).
    """
    means, logweights, logstds = (tensor.unsqueeze(-5) for tensor in mixture)
    scaled = (samples.unsqueeze(-4) - means) * (-logstds).exp()
    gaussian = (-0.5 * scaled.square() - logstds - 0.5 * math.log(2 * math.pi)).sum(dim=-3)
    return (gaussian + logweights.squeeze(-3)).logsumexp(dim=-3), gaussian


def gaussian_log_probability(samples: Tensor, gaussian: IsotropicGaussian) -> Tensor:
    """Logarithm of the density of samples (*, S, C, H, W) over all channels, (*, S, H, W)."""
    mean, variance = (tensor.unsqueeze(-4) for tensor in gaussian)
    squares = (samples - mean).square() / variance + (2 * math.pi * variance).log()
    return -0.5 * squares.expand_as(samples).sum(dim=-3)


def temper(mixture: GaussianMixture, temperature: float, eps: float = 1e-6) -> GaussianMixture:
    """Raise the weights to the power ``1 / temperature`` and scale the variance by it (at least ``eps``)."""
    temperature = max(temperature, eps)
    return GaussianMixture(
        mixture.means,
        (mixture.logweights / temperature).log_softmax(dim=-4),
        mixture.logstds + 0.5 * math.log(temperature),
    )


def sample_mixture(mixture: GaussianMixture, num_samples: int, source: RandomSource) -> Tensor:
    """Independent samples of every pixel.

    Args:
        mixture: The mixture, (*, K, C, H, W).
        num_samples: S.
        source: Source of the draws ``component``, one index per pixel and sample, and ``component_noise``.

    Returns:
        (*, S, C, H, W).
    """
    *batch, _, num_channels, height, width = mixture.means.shape
    weights = mixture.logweights.squeeze(-3).movedim(-3, -1).softmax(dim=-1)
    component = source.categorical('component', weights, num_samples)
    index = component.movedim(-1, -3).unsqueeze(-3)
    shape = (*batch, num_samples, num_channels, height, width)
    means = mixture.means.gather(-4, index.expand(*index.shape[:-3], num_channels, height, width))
    noise = source.normal('component_noise', shape, mixture.means.dtype, mixture.means.device)
    return means + mixture.logstds.exp() * noise
