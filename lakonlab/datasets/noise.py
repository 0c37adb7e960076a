"""Noise to start sampling from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def seeded_noise(seed: int, size: Sequence[int]) -> Tensor:
    """Standard normal noise of one sample, which thus depends neither on batch size nor on the number of processes.

    Args:
        seed: Seed of the sample, a function of its number.
        size: Shape (C, H, W).
    """
    return torch.randn(tuple(size), generator=torch.Generator().manual_seed(seed))
