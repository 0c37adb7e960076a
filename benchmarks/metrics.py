#!/usr/bin/env python
"""How long metrics of features take, and how much memory, against scipy's matrix square root and torch-fidelity.

python benchmarks/metrics.py                       10,000 and 50,000 features of 2,048 numbers
python benchmarks/metrics.py --counts 10000 --only frechet
python benchmarks/metrics.py --seconds 300         leaves out what takes longer

Features are random, with a spectrum that falls as that of pool features does. ``spectrum`` is FID from the moments on
of two covariances that are much alike and whose eigenvalues fall from 10 to 1e-5. Every measurement is a process of its
own with one thread; processor time, so that whatever else the machine does is not counted, and the most memory that was
held beyond the features.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib
import multiprocessing
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


def arrays_of(features: Tensor, reference: Tensor) -> list[np.ndarray]:
    """Mean and covariance of each."""
    moments = [moments_of(part) for part in (features, reference)]
    return [value.numpy() for part in moments for value in (part.mean(), part.covariance())]


def similar_moments(size: int) -> list[np.ndarray]:
    """Two covariances that are much alike, with eigenvalues over six decades, and means that are the same."""
    generator = torch.Generator().manual_seed(5)
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    first = basis * torch.logspace(1, -5, size, dtype=torch.float64) @ basis.T
    turn = torch.randn(size, size, generator=generator, dtype=torch.float64)
    turn, _ = torch.linalg.qr(torch.eye(size, dtype=torch.float64) + 3e-4 * (turn - turn.T))
    second = 1.03 * turn @ first @ turn.T
    mean = np.zeros(size)
    return [mean, ((first + first.T) / 2).numpy(), mean, ((second + second.T) / 2).numpy()]


def by_us(*arrays: np.ndarray) -> float:
    return frechet_distance(*map(torch.from_numpy, arrays))


def covariance_of_fidelity(features: Tensor) -> float:
    from torch_fidelity.metric_fid import fid_features_to_statistics

    return float(np.linalg.norm(fid_features_to_statistics(features)['sigma']))


def kernel_of_fidelity(features: Tensor, reference: Tensor) -> float:
    from torch_fidelity.metric_kid import kid_features_to_metric

    found = kid_features_to_metric(features, reference, kid_subsets=10, verbose=False)
    return found['kernel_inception_distance_mean']


def manifold_of_fidelity(features: Tensor, reference: Tensor) -> float:
    from torch_fidelity.metric_prc import calculate_precision_recall_part

    return sum(calculate_precision_recall_part(features, reference)[:2])


def score_of_fidelity(logits: Tensor) -> float:
    from torch_fidelity.metric_isc import isc_features_to_metric

    return isc_features_to_metric(logits, 10, shuffle=False)['inception_score_mean']


def manifold_of_us(features: Tensor, reference: Tensor) -> float:
    found = precision_recall(features, reference)
    return found.precision + found.recall


FRECHET = {'ours': by_us, 'scipy sqrtm': by_square_root, 'torch-fidelity': by_torch_fidelity}
PARTS: dict[str, dict[str, Callable[..., float]]] = {
    'frechet': FRECHET,
    'spectrum': FRECHET,
    'moments': {
        'ours': lambda features, _: moments_of(features).covariance().norm().item(),
        'torch-fidelity': lambda features, _: covariance_of_fidelity(features),
    },
    'kernel': {
        'ours': lambda features, reference: kernel_distance(features, reference, num_subsets=10).mean,
        'torch-fidelity': kernel_of_fidelity,
    },
    'manifold': {'ours': manifold_of_us, 'torch-fidelity': manifold_of_fidelity},
    'score': {'ours': lambda logits: inception_score(logits).mean, 'torch-fidelity': score_of_fidelity},
}
"""What is computed -> who computes it -> the function, of what :func:`inputs_of` returns, to a number to compare."""


IMPORTED = {
    'ours': (),
    'scipy sqrtm': ('scipy.linalg',),
    'torch-fidelity': tuple(f'torch_fidelity.metric_{metric}' for metric in ('fid', 'kid', 'prc', 'isc')),
}
"""What is imported before the clock starts."""


def inputs_of(part: str, count: int, size: int) -> list[Any]:
    """Arguments of the functions of a part."""
    if part == 'spectrum':
        return similar_moments(size)
    if part == 'score':
        return [3 * torch.randn(count, 1008, generator=torch.Generator().manual_seed(0))]
    features = [random_features(count, size, seed, 0.02 * seed) for seed in (2, 1)]
    return arrays_of(*features) if part == 'frechet' else features


def held(name: str) -> int:
    """Bytes of memory of this process: ``VmRSS``, or ``VmHWM``, the most since it was last reset."""
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f'{name}:'))


def measure(part: str, name: str, count: int, size: int, connection: Any) -> None:
    """Send the value, the processor seconds and the bytes of one measurement, in a process of its own."""
    torch.set_num_threads(1)
    for module in IMPORTED[name]:
        importlib.import_module(module)
    function, inputs = PARTS[part][name], inputs_of(part, count, size)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed is not free memory of this measurement
    Path('/proc/self/clear_refs').write_text('5')
    before, start = held('VmRSS'), time.process_time()
    value = function(*inputs)
    connection.send((value, time.process_time() - start, held('VmHWM') - before))


def measured(part: str, name: str, count: int, size: int, limit: float) -> tuple[float, float, int] | None:
    """What :func:`measure` sends; None if it takes longer than a limit in seconds, or fails."""
    context = multiprocessing.get_context('spawn')
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(part, name, count, size, sender), daemon=True)
    process.start()
    sender.close()
    try:
        found = receiver.recv() if receiver.poll(limit) else None
        process.join(0 if found is None else 60)
        return found
    except EOFError:
        return None
    finally:
        process.terminate()
        process.join()


def compare(part: str, count: int, size: int, limit: float) -> None:
    """Print a line for each that computes a part."""
    ours = None
    for name in PARTS[part]:
        found = measured(part, name, count, size, limit)
        if found is None:
            print(
                f'  {part:9} {name:15} no result: it failed, as said above, or took more than {limit:.0f} s', flush=True
            )
            continue
        value, seconds, memory = found
        line = f'  {part:9} {name:15} {seconds:9.2f} s {memory / 2**30:7.2f} GB   {value:.10g}'
        if name == 'ours':
            ours = value, seconds
        elif ours is not None:
            line += f'   relative difference {abs(ours[0] / value - 1):.1e}   {seconds / ours[1]:.1f} times ours'
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--counts', type=int, nargs='+', default=[10000, 50000])
    parser.add_argument('--size', type=int, default=2048, help='numbers of a feature')
    parser.add_argument('--only', nargs='+', choices=list(PARTS), default=list(PARTS))
    parser.add_argument('--seconds', type=float, default=3600, help='most time of a measurement')
    args = parser.parse_args()
    for count in args.counts:
        print(f'{count} features of {args.size} numbers', flush=True)
        for part in args.only:
            compare(part, count, args.size, args.seconds)


if __name__ == '__main__':
    main()
