#!/usr/bin/env python
"""How long metrics of features take, and how much memory, against scipy's matrix square root and torch-fidelity.

python benchmarks/metrics.py                       10,000 and 50,000 features of 2,048 numbers
python benchmarks/metrics.py --counts 10000 --only frechet

Features are random, with a spectrum that falls as that of pool features does. One thread; processor time, so that
whatever else the machine does is not counted.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch import Tensor

from lakonlab.evaluation.frechet import Moments, frechet_distance
from lakonlab.evaluation.inception_score import inception_score
from lakonlab.evaluation.kernel_distance import kernel_distance
from lakonlab.evaluation.manifold import precision_recall

PARTS = ('frechet', 'moments', 'kernel', 'manifold', 'score')


def random_features(count: int, size: int, seed: int, shift: float) -> Tensor:
    """Features that are not negative and correlated, whose covariance has eigenvalues that fall over five decades."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(0)))
    deviations = torch.logspace(0.3, -2.2, size)
    parts = [
        torch.relu(torch.randn(len(rows), size, generator=generator) * deviations @ basis + 0.4 + shift)
        for rows in torch.arange(count).split(2048)
    ]
    return torch.cat(parts)


def measured(function: Callable[[], Any]) -> tuple[Any, float]:
    """What a function returns, and the processor seconds it took."""
    start = time.process_time()
    value = function()
    return value, time.process_time() - start


def peak_gigabytes() -> float:
    """The most memory this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def moments_of(features: Tensor) -> Moments:
    moments = Moments()
    for part in features.split(256):
        moments.update(part)
    return moments


def by_square_root(mean_1: np.ndarray, cov_1: np.ndarray, mean_2: np.ndarray, cov_2: np.ndarray) -> float:
    from scipy.linalg import sqrtm

    root = sqrtm(cov_1 @ cov_2)
    return float(((mean_1 - mean_2) ** 2).sum() + np.trace(cov_1) + np.trace(cov_2) - 2 * np.trace(root).real)


def by_torch_fidelity(mean_1: np.ndarray, cov_1: np.ndarray, mean_2: np.ndarray, cov_2: np.ndarray) -> float:
    from torch_fidelity.metric_fid import fid_statistics_to_metric

    statistics = dict(mu=mean_1, sigma=cov_1), dict(mu=mean_2, sigma=cov_2)
    return fid_statistics_to_metric(*statistics, verbose=False)['frechet_inception_distance']


def compare_frechet(features: Tensor, reference: Tensor) -> None:
    """From the moments on."""
    values = []
    for part in (features, reference):
        moments = moments_of(part)
        values += [moments.mean(), moments.covariance()]
    arrays = [value.numpy() for value in values]
    ours, seconds = measured(lambda: frechet_distance(*values))
    print(f'  FID from moments   ours            {seconds:9.2f} s   {ours:.10g}')
    for name, function in (('scipy sqrtm', by_square_root), ('torch-fidelity', by_torch_fidelity)):
        theirs, their_seconds = measured(lambda function=function: function(*arrays))
        difference = abs(ours / theirs - 1)
        print(
            f'                     {name:15} {their_seconds:9.2f} s   {theirs:.10g}   relative difference '
            f'{difference:.1e}   {their_seconds / seconds:.1f} times ours'
        )


def compare_moments(features: Tensor) -> None:
    from torch_fidelity.metric_fid import fid_features_to_statistics

    ours, seconds = measured(lambda: moments_of(features).covariance())
    theirs, their_seconds = measured(lambda: fid_features_to_statistics(features)['sigma'])
    difference = (ours.numpy() - theirs).max() / theirs.max()
    print(f'  moments            ours, float64   {seconds:9.2f} s   in batches of 256, as they come')
    print(f'                     torch-fidelity  {their_seconds:9.2f} s   relative difference {difference:.1e}')


def compare_kernel(features: Tensor, reference: Tensor) -> None:
    from torch_fidelity.metric_kid import kid_features_to_metric

    ours, seconds = measured(lambda: kernel_distance(features, reference, num_subsets=10))
    theirs, their_seconds = measured(lambda: kid_features_to_metric(features, reference, kid_subsets=10, verbose=False))
    difference = abs(ours.mean / theirs['kernel_inception_distance_mean'] - 1)
    print(f'  KID, 10 subsets    ours            {seconds:9.2f} s   {ours.mean:.8g}')
    print(f'                     torch-fidelity  {their_seconds:9.2f} s   relative difference {difference:.1e}')


def compare_manifold(features: Tensor, reference: Tensor) -> None:
    from torch_fidelity.metric_prc import calculate_precision_recall_part

    before = peak_gigabytes()
    ours, seconds = measured(lambda: precision_recall(features, reference))
    held = peak_gigabytes() - before
    print(f'  precision, recall  ours            {seconds:9.2f} s   {ours}   {held:.2f} GB')
    theirs, their_seconds = measured(lambda: calculate_precision_recall_part(features, reference))
    more = peak_gigabytes() - before
    print(f'                     torch-fidelity  {their_seconds:9.2f} s   {theirs}   {more:.2f} GB')


def compare_score(count: int) -> None:
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = 3 * torch.randn(count, 1008, generator=torch.Generator().manual_seed(0))
    ours, seconds = measured(lambda: inception_score(logits))
    theirs, their_seconds = measured(lambda: isc_features_to_metric(logits, 10, shuffle=False))
    difference = abs(ours.mean / theirs['inception_score_mean'] - 1)
    print(f'  inception score    ours            {seconds:9.2f} s   {ours.mean:.8g}')
    print(f'                     torch-fidelity  {their_seconds:9.2f} s   relative difference {difference:.1e}')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--counts', type=int, nargs='+', default=[10000, 50000])
    parser.add_argument('--size', type=int, default=2048, help='numbers of a feature')
    parser.add_argument('--only', nargs='+', choices=PARTS, default=list(PARTS))
    parser.add_argument(
        '--manifold-limit', type=int, default=10000, help='features of precision and recall (time grows as the square)'
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    for count in args.counts:
        features, reference = (random_features(count, args.size, seed, 0.02 * seed) for seed in (2, 1))
        print(f'{count} features of {args.size} numbers')
        if 'frechet' in args.only:
            compare_frechet(features, reference)
        if 'moments' in args.only:
            compare_moments(features)
        if 'kernel' in args.only:
            compare_kernel(features, reference)
        if 'manifold' in args.only:
            compare_manifold(features[: args.manifold_limit], reference[: args.manifold_limit])
        if 'score' in args.only:
            compare_score(count)


if __name__ == '__main__':
    main()
