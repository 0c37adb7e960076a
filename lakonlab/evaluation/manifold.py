"""Precision and recall of generated images in feature space (Kynkäänniemi et al., 2019)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK_ROWS = 2048
BLOCK_COLUMNS = 8192


class PrecisionRecall(NamedTuple):
    """How the manifolds of two sets cover each other.

    Args:
        precision: Fraction of the generated images that lie inside the manifold of the real ones.
        recall: Fraction of the real images that lie inside the manifold of the generated ones.
    """

    precision: float
    recall: float


def precision_recall(features: Tensor, reference: Tensor, neighbours: int = 3) -> PrecisionRecall:
    """Precision and recall by balls around each member that reach to its k-th nearest neighbour.

    Distances are computed a block at a time, around the mean of the real features, so that memory is bounded whatever
    the number of images; inner products are in the precision of the features, the rest in float64.

    Args:
        features: Shape (N, D), of generated images.
        reference: Shape (M, D), of real images.
        neighbours: k; at least 1, less than N and M.

    Returns:
        Both fractions.

    Raises:
        ValueError: There are too few features for k neighbours.
    """
    if not 1 <= neighbours < min(len(features), len(reference)):
        raise ValueError(
            f'{neighbours} nearest neighbours cannot be found among {len(features)} generated and {len(reference)} '
            'real images: expected at least 1 and less than the fewer of them'
        )
    centre = reference.double().mean(dim=0).to(features.dtype)
    features = features - centre.to(features.device)
    reference = reference.to(features) - centre.to(features.device)
    radii, real_radii = (_squared_radii(part, neighbours) for part in (features, reference))
    is_precise = torch.zeros(len(features), dtype=torch.bool)
    is_recalled = torch.zeros(len(reference), dtype=torch.bool)
    for rows in _blocks(len(features), BLOCK_ROWS):
        for columns in _blocks(len(reference), BLOCK_COLUMNS):
            distances = _squared_distances(features[rows], reference[columns])
            is_precise[rows] |= (distances <= real_radii[columns]).any(dim=1).cpu()
            is_recalled[columns] |= (distances <= radii[rows, None]).any(dim=0).cpu()
    return PrecisionRecall(is_precise.double().mean().item(), is_recalled.double().mean().item())


def _squared_radii(members: Tensor, neighbours: int) -> Tensor:
    """Squared distance of each member to its k-th nearest neighbour, shape (N,), float64."""
    radii = members.new_empty(len(members), dtype=torch.float64)
    for rows in _blocks(len(members), BLOCK_ROWS):
        nearest = None
        for columns in _blocks(len(members), BLOCK_COLUMNS):
            distances = _squared_distances(members[rows], members[columns])
            found = distances.topk(min(neighbours + 1, distances.shape[1]), dim=1, largest=False).values
            nearest = found if nearest is None else torch.cat([nearest, found], dim=1)
        # the nearest of all is the member itself
        radii[rows] = nearest.kthvalue(neighbours + 1, dim=1).values
    return radii


def _squared_distances(left: Tensor, right: Tensor) -> Tensor:
    """Squared Euclidean distances, shape (N, M), float64."""
    products = (left @ right.T).double()
    squares = [part.double().square().sum(dim=1) for part in (left, right)]
    return products.mul_(-2).add_(squares[0][:, None]).add_(squares[1]).clamp_(min=0)


def _blocks(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]
