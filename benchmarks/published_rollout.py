"""The rollouts as published, written out plainly: the baseline of ``rollout.py``.

Everything here is elementwise algebra over whole tensors, one pass per substep: a mixture over ``x_0`` is made of the
network's output, each substep forms its posterior, and the velocity is the difference to the state over sigma.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def _images(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *([1] * (like.dim() - 1))).to(like)


class PublishedMixture:
    """Posterior velocity of a mixture through ``E[x_0 | x_t]``."""

    def __init__(self, output: dict[str, Tensor], x_src: Tensor, sigma_src: Tensor, eps: float = 1e-6):
        sigma = _images(sigma_src, x_src)
        self.eps, self.x_src, self.sigma_src = eps, x_src, sigma
        self.means = x_src.unsqueeze(1) - sigma.unsqueeze(1) * output['means']
        self.logweights = output['logweights']
        self.variance = (2 * output['logstds']).exp() * sigma.unsqueeze(1).square()

    def velocity(self, x_t: Tensor, sigma_t: Tensor) -> Tensor:
        s, s_src = sigma_t.clamp(min=self.eps), self.sigma_src.clamp(min=self.eps)
        a, a_src = (1 - s) / s, (1 - s_src) / s_src
        zeta = (a.square() - a_src.square()).unsqueeze(1)
        nu = (a * x_t / s - a_src * self.x_src / s_src).unsqueeze(1)
        denominator = (self.variance * zeta + 1).clamp(min=self.eps)
        posterior_means = (self.variance * nu + self.means) / denominator
        logits = self.logweights + (self.means * (nu - zeta * self.means / 2) / denominator).sum(dim=2, keepdim=True)
        x_0 = (logits.softmax(dim=1) * posterior_means).sum(dim=1)
        return (x_t - x_0) / s


class PublishedGrid:
    """Velocity of a DX policy: the two neighbouring grid points gathered per substep, linearly interpolated."""

    def __init__(self, output: Tensor, x_src: Tensor, sigma_src: Tensor, eps: float = 1e-4):
        sigma = _images(sigma_src, x_src)
        self.eps, self.grid, self.sigma_src = eps, x_src.unsqueeze(1) - sigma.unsqueeze(1) * output, sigma_src

    def velocity(self, x_t: Tensor, sigma_t: Tensor) -> Tensor:
        last = self.grid.shape[1] - 1
        position = (sigma_t.flatten() / self.sigma_src).clamp(0, 1) * last
        low = position.floor().long().clamp(max=last - 1)
        index = torch.stack([low, low + 1], dim=1)
        index = index.reshape(*index.shape, *([1] * (x_t.dim() - 1))).expand(-1, -1, *x_t.shape[1:])
        below, above = self.grid.gather(1, index).unbind(dim=1)
        x_0 = torch.lerp(below, above, _images(position - low, x_t))
        return (x_t - x_0) / sigma_t.clamp(min=self.eps)


def rollout(policy, x_start: Tensor, raw_start: float, raw_end: float, counts: Tensor, checkpointing: bool) -> Tensor:
    """Explicit Euler: everybody to the longest count, the schedule computed as the loop goes.

    Args:
        policy: One of the classes above.
        x_start: State, (B, C, *).
        raw_start: Schedule time of the start; the shift is 1, so this is sigma.
        raw_end: Schedule time of the end.
        counts: Substeps of each sample, (B,).
        checkpointing: Recompute each substep in the backward pass.
    """
    x_t = x_start
    raw = torch.full((len(x_start),), raw_start, dtype=x_start.dtype)
    step = (raw_start - raw_end) / counts.to(x_start)
    for i in range(int(counts.max())):
        raw_next = (raw - step).clamp(min=0)
        sigma, sigma_next = _images(raw, x_t), _images(raw_next, x_t)
        if checkpointing:
            u = checkpoint(policy.velocity, x_t, sigma, use_reentrant=False)
        else:
            u = policy.velocity(x_t, sigma)
        active = _images(counts > i, x_t).bool()
        x_t = torch.where(active, x_t + u * (sigma_next - sigma), x_t)
        raw = torch.where(counts > i, raw_next, raw)
    return x_t
