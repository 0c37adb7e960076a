"""A Gaussian-mixture data distribution whose flow is known in closed form."""

from __future__ import annotations

import torch
from torch import Tensor


class ExactMixture:
    """``x_0`` of every pixel is drawn from ``sum_k weights_k N(means_k, std^2 I)``, pixels independently.

    Args:
        means: (K, C).
        weights: (K,), positive; normalised here.
        std: Standard deviation shared by components and channels; 0 makes the data discrete.
    """

    def __init__(self, means: Tensor, weights: Tensor, std: float):
        self.means, self.weights, self.std = means, weights / weights.sum(), float(std)

    def _conditional(self, x: Tensor, sigma: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Velocity given the component (B, K, C, *), log-probability of the component (B, K, 1, *), variance of x_t."""
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).reshape(-1, *([1] * x.dim()))
        means = self.means.to(x).reshape(1, *self.means.shape, *([1] * (x.dim() - 2)))
        alpha = 1 - sigma
        variance = alpha**2 * self.std**2 + sigma**2
        residual = x.unsqueeze(1) - alpha * means
        log_prior = self.weights.to(x).log().reshape(1, -1, 1, *([1] * (x.dim() - 2)))
        logits = log_prior - residual.square().sum(2, keepdim=True) / (2 * variance)
        return (sigma - alpha * self.std**2) / variance * residual - means, logits.log_softmax(1), variance

    def velocity(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        """``E[noise - x_0 | x_t = x]``.

        Args:
            x: State, (B, C, *).
            sigma: Noise level, a number or (B,); above 0 if ``std`` is 0.
        """
        u, log_probability, _ = self._conditional(x, sigma)
        return (log_probability.exp() * u).sum(1)

    def mixture_output(self, x: Tensor, sigma: float | Tensor) -> dict[str, Tensor]:
        """What a perfect GMFlow network answers: the posterior of ``u = (x - x_0) / sigma`` as a mixture.

        Returns:
            ``means`` (B, K, C, *), ``logweights`` (B, K, 1, *), ``logstds`` (B, 1, 1, *1).
        """
        u, log_probability, variance = self._conditional(x, sigma)
        logstds = (self.std / variance.sqrt()).log().expand(len(x), *variance.shape[1:])
        return {'means': u, 'logweights': log_probability, 'logstds': logstds}

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Clean data, (count, C, 1, 1), in the dtype of ``means``."""
        component = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, self.means.shape[1], generator=generator, dtype=self.means.dtype)
        return (self.means[component] + self.std * noise)[..., None, None]

    def moments(self, sigma: float) -> tuple[Tensor, Tensor]:
        """Mean (C,) and covariance (C, C) of ``x_t`` at a noise level."""
        mean = self.weights @ self.means
        centred = self.means - mean
        covariance = (self.weights[:, None] * centred).T @ centred
        identity = torch.eye(len(mean), dtype=mean.dtype)
        covariance = (1 - sigma) ** 2 * (covariance + self.std**2 * identity) + sigma**2 * identity
        return (1 - sigma) * mean, covariance
