"""The Knothe-Rosenblatt map between samples of an isotropic Gaussian mixture and normal noise, pixel by pixel.

In a basis of the channels, ``z_i = Phi^-1(F(x_i | x_1, ..., x_{i-1}))``, where the conditional distribution of one
channel given the previous ones is a mixture in one dimension. The basis is that of the principal axes of the mixtures'
covariance averaged over the pixels of an image, the widest first, with the signs that ``torch.linalg.eigh`` gives them;
noise is expressed in this basis. Gradients take the basis as given.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lakonlab.ops.isotropic_mixture import GaussianMixture, full_gaussian

LARGEST_ERF = 1 - 1e-6  # bounds the noise to |z| < 4.9, as recorded
NUM_ITERATIONS = 48


def to_normal(samples: Tensor, mixture: GaussianMixture) -> Tensor:
    """Noise that stands for given samples.

    Args:
        samples: S samples of every pixel, (*, S, C, H, W).
        mixture: The mixture, (*, K, C, H, W).

    Returns:
        Standard normal if the samples are distributed as the mixture, (*, S, C, H, W), in the principal axes.
    """
    axes = principal_axes(mixture)
    rotated = _rotate(samples, axes.mT)
    means, logweights, stds = _conditionals(mixture, axes)
    noise = []
    for x, mean in zip(rotated.unbind(-3), means.unbind(-3)):
        scaled = (x.unsqueeze(-3) - mean) / stds
        erf = (logweights.softmax(dim=-3) * torch.erf(scaled * math.sqrt(0.5))).sum(dim=-3)
        noise.append(math.sqrt(2) * torch.erfinv(erf.clamp(-LARGEST_ERF, LARGEST_ERF)))
        logweights = logweights - 0.5 * scaled.square()
    return torch.stack(noise, dim=-3)


def from_normal(noise: Tensor, mixture: GaussianMixture) -> Tensor:
    """Samples that stand for given noise, the inverse of :func:`to_normal`.

    Args:
        noise: (*, S, C, H, W), in the principal axes.
        mixture: The mixture, (*, K, C, H, W).

    Returns:
        Distributed as the mixture if the noise is standard normal, (*, S, C, H, W).
    """
    axes = principal_axes(mixture)
    means, logweights, stds = _conditionals(mixture, axes)
    rotated = []
    for z, mean in zip(noise.unbind(-3), means.unbind(-3)):
        x = mixture_quantile(z, mean, logweights, stds, dim=-3)
        rotated.append(x)
        logweights = logweights - 0.5 * ((x.unsqueeze(-3) - mean) / stds).square()
    return _rotate(torch.stack(rotated, dim=-3), axes)


def mixture_quantile(z: Tensor, means: Tensor, logweights: Tensor, std: Tensor, dim: int = -1) -> Tensor:
    """Inverse distribution function of mixtures in one dimension: the x with ``F(x) = Phi(z)``.

    Newton's method on ``log F`` (of the tail that z is in), inside a bracket that every step narrows; a step that
    leaves it, and every third one far from the solution, is a bisection. The number of steps is fixed, so that no
    device is waited for.

    Args:
        z: Normal quantile of the probability, any shape.
        means: Means of the components along dimension ``dim``, which ``z`` lacks.
        logweights: Logarithms of their weights up to a constant, like ``means``.
        std: Standard deviation they share, broadcastable to ``means``.
        dim: Dimension of the components, negative.

    Returns:
        Shaped like ``z``, differentiable once in everything through the implicit function theorem.
    """
    logweights = logweights.log_softmax(dim=dim)
    with torch.no_grad():
        side = torch.where(z > 0, -1.0, 1.0).to(z.dtype)  # look at the upper tail from above
        lower_z = -z.abs()
        target = torch.special.log_ndtr(lower_z)
        centres = side.unsqueeze(dim) * means
        scale = std.squeeze(dim)
        low, high = (bound + scale * lower_z for bound in (centres.amin(dim=dim), centres.amax(dim=dim)))
        weights = logweights.exp()
        mean = (weights * centres).sum(dim=dim)
        variance = (weights * (centres - mean.unsqueeze(dim)).square()).sum(dim=dim) + scale.square()
        x = torch.minimum(torch.maximum(mean + variance.sqrt() * lower_z, low), high)
        for i in range(NUM_ITERATIONS):
            excess, slope = _log_distribution(x, centres, logweights, std, dim)
            excess = excess - target
            is_above = excess > 0
            low, high = torch.where(is_above, low, x), torch.where(is_above, x, high)
            newton = x - excess / slope
            bisect = ~((newton >= low) & (newton <= high))
            if i % 3 == 0:
                bisect = bisect | (excess.abs() > 1e-3)
            x = torch.where(bisect, 0.5 * (low + high), newton)
        x = side * x
    return _at_solution(x, z, means, logweights, std, dim)


def _at_solution(x: Tensor, z: Tensor, means: Tensor, logweights: Tensor, std: Tensor, dim: int) -> Tensor:
    """One more Newton step, through which the gradient flows; none between components so far apart that F is flat."""
    side = torch.where(z > 0, -1.0, 1.0).to(z.dtype)
    logarithm, slope = _log_distribution(side * x, side.unsqueeze(dim) * means, logweights, std, dim)
    excess = logarithm - torch.special.log_ndtr(side * z)
    step = excess / slope.detach()
    return x - side * torch.where(step.abs() < 0.1 * std.squeeze(dim), step, 0.0)


def _log_distribution(x: Tensor, means: Tensor, logweights: Tensor, std: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """``log F(x)`` and its derivative."""
    scaled = (x.unsqueeze(dim) - means) / std
    logarithm = (logweights + torch.special.log_ndtr(scaled)).logsumexp(dim=dim)
    density = (logweights - 0.5 * scaled.square() - 0.5 * math.log(2 * math.pi) - std.log()).logsumexp(dim=dim)
    return logarithm, (density - logarithm).exp()


@torch.no_grad()
def principal_axes(mixture: GaussianMixture) -> Tensor:
    """Eigenvectors of the covariance averaged over pixels, as columns (*, C, C), by decreasing eigenvalue."""
    _, covariance = full_gaussian(mixture)
    return torch.linalg.eigh(covariance.mean(dim=(-4, -3))).eigenvectors.flip(-1)


def _rotate(samples: Tensor, matrix: Tensor) -> Tensor:
    """Multiply the channels of (*, S, C, H, W) by a matrix (*, C, C)."""
    return torch.einsum('...ij,...sjhw->...sihw', matrix, samples)


def _conditionals(mixture: GaussianMixture, axes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Means (*, 1, K, C, H, W), log-weights (*, 1, K, H, W) and standard deviations (*, 1, 1, 1, 1) to begin with."""
    means = _rotate(mixture.means, axes.mT).unsqueeze(-5)
    logweights = mixture.logweights.squeeze(-3).unsqueeze(-4)
    return means, logweights, mixture.logstds.exp().squeeze(-3).unsqueeze(-4)
