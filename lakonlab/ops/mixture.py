"""The posterior velocity of a Gaussian mixture that was predicted at another noise level.

A GMFlow network looks at ``x_src`` (noise level ``S = sigma_src``) and predicts a mixture over the velocity with
means ``m_k``, weights ``pi_k`` and one variance ``v`` per sample. As a mixture over ``x_0`` it has means
``x_src - S m_k`` and variance ``S^2 v``. Conditioning it on a later state ``x_t`` (noise level ``s``) is again a
mixture, whose mean velocity is what a pi-Flow policy follows (Chen et al., "pi-Flow", 2025, and "Gaussian Mixture Flow
Matching Models", 2025).

The usual route, ``(x_t - E[x_0]) / s``, cancels as ``s`` goes to 0. Here everything stays in velocity space. With
``d = x_t - x_src``, ``q = s / S``, ``a0 = 1 - S``, ``a1 = 1 - s``, ``A = a1^2 - a0^2 q^2 = (1 - q)(a1 + a0 q)`` and
``D = v A + q^2``, completing the square in the product of the two Gaussian likelihoods gives

    logit_k = log pi_k + m_k . g - A / (2 D) |m_k|^2,    g = -(a1 / (S D)) d - (q (1 - q) / D) x_src
    u       = (q (1 - v a0) / S - v (1 - q)) / D * d - v (1 - q) / D * x_src + (q / D) sum_k softmax(logit)_k m_k

At the source point ``d = 0`` and ``q = 1``, so ``u`` is the weighted mean of the ``m_k`` without a special case.

Shapes: B batch, K components, C channels; means (B, K, C, *), logweights (B, K, 1, *), x (B, C, *).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class PosteriorCoefficients(NamedTuple):
    """The factors of the formula above; each has the shape of the noise levels they were made from."""

    u_offset: Tensor
    """Factor of ``d = x_t - x_src`` in the velocity."""
    u_source: Tensor
    """Factor of ``x_src`` in the velocity."""
    u_mean: Tensor
    """Factor of the posterior-weighted mean of the components in the velocity."""
    logit_offset: Tensor
    """Factor of ``m_k . d`` in the logits."""
    logit_source: Tensor
    """Factor of ``m_k . x_src`` in the logits."""
    logit_norm: Tensor
    """Factor of ``|m_k|^2`` in the logits."""


def posterior_coefficients(sigma_src: Tensor, sigma_t: Tensor, variance: Tensor) -> PosteriorCoefficients:
    """Coefficients of the posterior velocity for given noise levels.

    Args:
        sigma_src: Noise level in (0, 1] at which the mixture was predicted; broadcastable to ``sigma_t``.
        sigma_t: Noise level in (0, ``sigma_src``] of the state.
        variance: Variance of the components in velocity space; broadcastable to ``sigma_t``.
    """
    alpha_src, alpha_t = 1 - sigma_src, 1 - sigma_t
    q = sigma_t / sigma_src
    gap = 1 - q
    a = gap * (alpha_t + alpha_src * q)
    d = variance * a + q * q
    u_source = -variance * gap / d
    return PosteriorCoefficients(
        u_offset=q * (1 - variance * alpha_src) / (sigma_src * d) + u_source,
        u_source=u_source,
        u_mean=q / d,
        logit_offset=-alpha_t / (sigma_src * d),
        logit_source=-q * gap / d,
        logit_norm=-0.5 * a / d,
    )


def posterior_velocity(
    means: Tensor,
    logweights: Tensor,
    squared_norms: Tensor,
    x_src: Tensor,
    offset: Tensor,
    coefficients: PosteriorCoefficients,
) -> Tensor:
    """Mean velocity of the mixture given the state ``x_src + offset``.

    Args:
        means: Component means in velocity space, (B, K, C, *).
        logweights: Logarithms of the weights up to a constant, (B, K, 1, *).
        squared_norms: ``|m_k|^2`` summed over channels, (B, K, 1, *).
        x_src: State at which the mixture was predicted, (B, C, *).
        offset: ``x_t - x_src``, (B, C, *).
        coefficients: From :func:`posterior_coefficients`, each of shape (B, 1, *1).

    Returns:
        Velocity, (B, C, *).
    """
    c = coefficients
    g = torch.addcmul(c.logit_offset * offset, c.logit_source, x_src)
    alignment = (means * g.unsqueeze(1)).sum(dim=2, keepdim=True)
    logits = torch.addcmul(logweights, c.logit_norm.unsqueeze(1), squared_norms) + alignment
    mean = (logits.softmax(dim=1) * means).sum(dim=1)
    return torch.addcmul(torch.addcmul(c.u_offset * offset, c.u_source, x_src), c.u_mean, mean)


def drop_components(logweights: Tensor, uniform: Tensor, probability: float) -> Tensor:
    """Drop whole components of each sample, never all of them.

    Args:
        logweights: (B, K, 1, *).
        uniform: U[0, 1) draws, (B, K, 1, *1), one per sample and component.
        probability: A component is dropped where its draw is below it.

    Returns:
        Log-weights with ``-inf`` for dropped components, not renormalised.
    """
    dropped = uniform < probability
    dropped = dropped & ~dropped.all(dim=1, keepdim=True)
    remaining = logweights.masked_fill(dropped, -torch.inf)
    nothing_left = remaining.isneginf().all(dim=1, keepdim=True)  # where components had been dropped before
    return torch.where(nothing_left, logweights, remaining)
