"""Precision and recall of generated images in feature space (Kynkäänniemi et al., 2019)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from lakonlab.phases import beat

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
    centre = reference.mean(dim=0, dtype=torch.float64).to(features)
    generated, real = _Members(features - centre), _Members(reference.to(features) - centre)
    count, real_count = len(features), len(reference)
    pairs = count * (count + 1) // 2 + real_count * (real_count + 1) // 2 + count * real_count
    with tqdm(total=pairs, desc='precision, recall', unit='pair', unit_scale=True, leave=False, disable=None) as bar:
        radii, real_radii = (_squared_radii(members, neighbours, bar) for members in (generated, real))
        is_precise = torch.zeros(count, dtype=torch.bool)
        is_recalled = torch.zeros(real_count, dtype=torch.bool)
        for rows in _blocks(0, count, BLOCK_ROWS):
            for columns in _blocks(0, real_count, BLOCK_COLUMNS):
                distances = _squared_distances(generated, rows, real, columns)
                is_precise[rows] |= (distances <= real_radii[columns]).any(dim=1).cpu()
                is_recalled[columns] |= (distances <= radii[rows, None]).any(dim=0).cpu()
                _done(bar, distances.numel())
    return PrecisionRecall(is_precise.double().mean().item(), is_recalled.double().mean().item())


class _Members:
    """A set of features (N, D), with their squared lengths (N,) in float64."""

    def __init__(self, features: Tensor):
        self.features = features
        parts = features.split(BLOCK_ROWS)
        self.squares = torch.cat([part.double().square_().sum(dim=1) for part in parts])


def _done(bar: tqdm, pairs: int) -> None:
    bar.update(pairs)
    beat()


def _squared_radii(members: _Members, neighbours: int, bar: tqdm) -> Tensor:
    """Squared distance of each member to its k-th nearest neighbour, shape (N,), float64."""
    count = len(members.squares)
    # the nearest of all is the member itself
    nearest = members.squares.new_full((count, neighbours + 1), torch.inf)

    def take_in(rows: slice, distances: Tensor) -> None:
        found = distances.topk(min(neighbours + 1, distances.shape[1]), dim=1, largest=False).values
        nearest[rows] = torch.cat([nearest[rows], found], dim=1).topk(neighbours + 1, dim=1, largest=False).values

    for rows in _blocks(0, count, BLOCK_ROWS):
        take_in(rows, _squared_distances(members, rows, members, rows))
        size = rows.stop - rows.start
        _done(bar, size * (size + 1) // 2)
        for columns in _blocks(rows.stop, count, BLOCK_COLUMNS):  # of a pair, the distance is computed once
            distances = _squared_distances(members, rows, members, columns)
            take_in(rows, distances)
            take_in(columns, distances.T.contiguous())
            _done(bar, distances.numel())
    return nearest.amax(dim=1)


def _squared_distances(left: _Members, rows: slice, right: _Members, columns: slice) -> Tensor:
    """Squared Euclidean distances of parts of two sets, shape (n, m), float64."""
    products = (left.features[rows] @ right.features[columns].T).double()
    return products.mul_(-2).add_(left.squares[rows, None]).add_(right.squares[columns]).clamp_(min=0)


def _blocks(start: int, stop: int, size: int) -> list[slice]:
    return [slice(first, min(first + size, stop)) for first in range(start, stop, size)]
