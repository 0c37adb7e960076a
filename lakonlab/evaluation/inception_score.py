"""Inception score (Salimans et al., 2016)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lakonlab.evaluation.estimate import Estimate
from lakonlab.evaluation.kernel_distance import SEED


def inception_score(logits: Tensor, splits: int = 10, shuffle: bool = False, seed: int = SEED) -> Estimate:
    """Exponential of the mean divergence of each image's classes from those of its split.

    Args:
        logits: Class scores without bias, shape (N, number of classes), in the order of the images.
        splits: Number of parts, of sizes as equal as can be.
        shuffle: Draw the members of the parts at random instead of taking consecutive images.
        seed: Seed of that draw.

    Returns:
        Mean and standard deviation over the parts.

    Raises:
        ValueError: There are fewer images than parts.
    """
    count = len(logits)
    if not 1 <= splits <= count:
        raise ValueError(f'{count} images cannot be divided into {splits} parts: expected 1 to {count}')
    if shuffle:
        logits = logits[torch.from_numpy(np.random.RandomState(seed).permutation(count)).to(logits.device)]
    scores = []
    for part in range(splits):
        log_p = logits[part * count // splits : (part + 1) * count // splits].double().log_softmax(dim=1)
        p = log_p.exp()
        # xlogy: a class that no image of the part shows adds nothing
        entropy = -torch.special.xlogy(p, p).sum(dim=1).mean()
        marginal = p.mean(dim=0)
        scores.append((-torch.special.xlogy(marginal, marginal).sum() - entropy).exp().item())
    return Estimate.of(scores)
