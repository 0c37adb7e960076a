"""Kernel distance between two sets of features (Binkowski et al., 2018, KID)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lakonlab.evaluation.estimate import Estimate
from lakonlab.phases import beat

SEED = 2020
"""Seed of everything that metrics draw; that of torch-fidelity, so that it draws the same subsets."""
KERNEL_ROWS = 256


def kernel_distance(
    features: Tensor, reference: Tensor, num_subsets: int = 100, subset_size: int = 1000, seed: int = SEED
) -> Estimate:
    """Squared maximum mean discrepancy under the kernel ``(x . y / D + 1)^3``, averaged over random subsets.

    The estimator is unbiased: the mean over all pairs of different members of a set, so it may be negative. Inner
    products are in the precision of the features, all sums in float64.

    Args:
        features: Shape (N, D), of generated images.
        reference: Shape (M, D), of real images.
        num_subsets: How many pairs of subsets are drawn, each without repetition.
        subset_size: Members of each; at most N and M.
        seed: Seed of the draws.

    Returns:
        Mean and standard deviation over the subsets.

    Raises:
        ValueError: There are fewer features than a subset needs, or a subset is too small for pairs.
    """
    if not 2 <= subset_size <= min(len(features), len(reference)):
        raise ValueError(
            f'subsets of {subset_size} cannot be drawn of {len(features)} generated and {len(reference)} real images: '
            'expected at least 2 and at most the fewer of them'
        )
    draws = np.random.RandomState(seed)
    values = []
    for _ in range(num_subsets):
        mine = features[torch.from_numpy(draws.choice(len(features), subset_size, replace=False)).to(features.device)]
        real = reference[
            torch.from_numpy(draws.choice(len(reference), subset_size, replace=False)).to(reference.device)
        ]
        values.append(unbiased_discrepancy(mine, real.to(mine.device)))
        beat()
    return Estimate.of(values)


def unbiased_discrepancy(features: Tensor, reference: Tensor) -> float:
    """Unbiased estimate of the squared maximum mean discrepancy of all given features.

    Args:
        features: Shape (N, D), N at least 2.
        reference: Shape (M, D), M at least 2.

    Returns:
        The estimate, in which no feature is paired with itself.
    """
    within = [_sum_within(part) / (len(part) * (len(part) - 1)) for part in (features, reference)]
    return sum(within) - 2 * _sum_between(features, reference) / (len(features) * len(reference))


def _sum_between(left: Tensor, right: Tensor) -> float:
    """Sum of the kernel over pairs of a member of each, a block of rows at a time."""
    return sum(_kernel(rows, right).sum().item() for rows in left.split(KERNEL_ROWS))


def _sum_within(members: Tensor) -> float:
    """Sum of the kernel over ordered pairs of different members; each pair is computed once."""
    total = 0.0
    for start in range(0, len(members), KERNEL_ROWS):
        rows, later = members[start : start + KERNEL_ROWS], members[start + KERNEL_ROWS :]
        total += _kernel(rows, rows).fill_diagonal_(0).sum().item() + 2 * _sum_between(rows, later)
    return total


def _kernel(left: Tensor, right: Tensor) -> Tensor:
    """``(x . y / D + 1)^3`` of each pair, shape (N, M), float64."""
    base = (left @ right.T).double().div_(left.shape[1]).add_(1)
    return base.square().mul_(base)
