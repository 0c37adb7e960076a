"""First and second moments of features, and the Fréchet distance between two Gaussians that have them."""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCE = 9e-7
"""Most that the faster way may be wrong by, relative to the distance, by a bound that it rarely comes near."""
SAFETY = 10
BLOCK = 256


class Moments:
    """Running mean and covariance, accumulated in double precision around the first batch's mean.

    The shift keeps the accumulation accurate for features whose mean is large against their spread.
    """

    def __init__(self):
        self.count = 0
        self._shift: Tensor | None = None
        self._sum: Tensor | None = None
        self._products: Tensor | None = None

    def update(self, features: Tensor) -> None:
        """Add samples.

        Args:
            features: Shape (B, D).

        Raises:
            ValueError: The features are not finite.
        """
        features = features.double().cpu()
        if not torch.isfinite(features).all():
            raise ValueError('features are not finite: the samples or the feature extractor are broken')
        if not len(features):
            return
        if self._shift is None:
            self._shift = features.mean(dim=0)
            self._sum = torch.zeros_like(self._shift)
            self._products = features.new_zeros(features.shape[1], features.shape[1])
        centred = features - self._shift
        self.count += len(features)
        self._sum += centred.sum(dim=0)
        for start in range(0, centred.shape[1], BLOCK):  # of a symmetric matrix, the lower half
            stop = start + BLOCK
            self._products[start:, start:stop].addmm_(centred[:, start:].T, centred[:, start:stop])

    def mean(self) -> Tensor:
        """The mean.

        Returns:
            Shape (D,), float64.
        """
        return self._shift + self._sum / self.count

    def covariance(self) -> Tensor:
        """The unbiased covariance.

        Returns:
            Shape (D, D), float64.

        Raises:
            ValueError: Fewer than two samples were added.
        """
        if self.count < 2:
            raise ValueError(f'a covariance needs at least 2 samples, got {self.count}')
        lower = (self._products - torch.outer(self._sum, self._sum) / self.count).tril_()
        return (lower + lower.tril(-1).T) / (self.count - 1)


def frechet_distance(mean_1: Tensor, covariance_1: Tensor, mean_2: Tensor, covariance_2: Tensor) -> float:
    """Squared 2-Wasserstein distance between two Gaussians (Dowson & Landau, 1982; Heusel et al., 2017, FID).

    ``|mean_1 - mean_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2))``. No matrix square root is computed, only its trace. With
    ``C_i = F_i F_i^T`` that is the sum of the singular values of ``F_1^T F_2``, or of the roots of the eigenvalues of
    ``F_1^T C_2 F_1``. The latter is faster; the former loses no digits to squares. Neither needs complex numbers or
    regularisation. Eigenvalues are used where the roots cannot lose more than 9e-7 of the distance by the worst case of
    rounding; or where those of ``F_2^T C_1 F_2``, the same but for rounding of its own, have roots that differ by ten
    times less than that, added up without regard to sign.

    The factors are Cholesky's; where a covariance is singular, or so close to it that rounding decides, its
    eigenvectors. An eigenvalue that rounding alone can make, at most D times the precision of float64 relative to the
    largest, counts as zero: its root would be wrong by 1e-8. So singular covariances are no less exact than others.

    Args:
        mean_1: Shape (D,).
        covariance_1: Shape (D, D), symmetric, positive semi-definite.
        mean_2: Shape (D,).
        covariance_2: Shape (D, D), symmetric, positive semi-definite.

    Returns:
        The distance, at least 0 up to rounding, which is relative to the traces of the covariances.

    Raises:
        ValueError: The moments are of features of different dimensions.
    """
    if covariance_1.shape != covariance_2.shape:
        raise ValueError(
            f'moments of {len(covariance_1)} and {len(covariance_2)} features cannot be compared: they are not of the '
            'same extractor'
        )
    mean_1, covariance_1, mean_2, covariance_2 = (
        tensor.double() for tensor in (mean_1, covariance_1, mean_2, covariance_2)
    )
    apart = ((mean_1 - mean_2).square().sum() + covariance_1.trace() + covariance_2.trace()).item()
    factor_1 = _cholesky(covariance_1)
    if factor_1 is not None:
        roots, worst = _roots_by_eigenvalues(factor_1, covariance_2)
        distance = apart - 2 * roots.sum().item()
        if 2 * worst.sum().item() <= TOLERANCE * distance:
            return distance
    factor_2 = _cholesky(covariance_2)
    if factor_1 is not None and factor_2 is not None:
        others, _ = _roots_by_eigenvalues(factor_2, covariance_1)
        # what rounding alone can make says nothing, even if it is the same
        differences = (roots - others).abs().where(worst < roots, worst)
        distance = apart - (roots + others).sum().item()
        if SAFETY * 2 * differences.sum().item() <= TOLERANCE * distance:
            return distance
    factor_1 = factor_1 if factor_1 is not None else _eigenvector_factor(covariance_1)
    factor_2 = factor_2 if factor_2 is not None else _eigenvector_factor(covariance_2)
    return apart - 2 * torch.linalg.svdvals(factor_1.T @ factor_2).sum().item()


def _cholesky(covariance: Tensor) -> Tensor | None:
    """The lower triangular ``L`` with ``L L^T`` a covariance; None if that is singular but for rounding."""
    lower, failed = torch.linalg.cholesky_ex(covariance)
    rounding = len(covariance) * torch.finfo(covariance.dtype).eps
    if failed or lower.diagonal().square().min() <= rounding * covariance.diagonal().max():
        return None
    return lower


def _eigenvector_factor(covariance: Tensor) -> Tensor:
    """``F`` (D, R) with ``F F^T`` a covariance (D, D) of rank R."""
    eigenvalues, eigenvectors = torch.linalg.eigh(covariance)
    rounding = len(covariance) * torch.finfo(covariance.dtype).eps
    held = eigenvalues > rounding * eigenvalues[-1].clamp(min=0)
    return eigenvectors[:, held] * eigenvalues[held].sqrt()


def _roots_by_eigenvalues(lower: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues of the root of ``(L L^T) C``, and by how much each may be wrong.

    Args:
        lower: ``L``, shape (D, D), lower triangular.
        covariance: ``C``, shape (D, D).

    Returns:
        Both of shape (D,), in increasing order of the eigenvalues.
    """
    # of L^T C L, only the lower half is computed, and of L only what is not zero is multiplied
    size, product = len(lower), torch.zeros_like(lower)
    for start in range(0, size, BLOCK):
        stop = start + BLOCK
        columns = covariance[:, start:] @ lower[start:, start:stop]
        for row in range(start, size, BLOCK):
            product[row : row + BLOCK, start:stop] = lower[row:, row : row + BLOCK].T @ columns[row:]
    eigenvalues = torch.linalg.eigvalsh(product, UPLO='L').clamp(min=0)
    rounding = size**0.5 * torch.finfo(lower.dtype).eps * eigenvalues[-1]
    roots = eigenvalues.sqrt()
    return roots, torch.minimum(rounding.sqrt(), rounding / (2 * roots))
