"""Global random state, for everything that does not draw from a named source."""

from __future__ import annotations

import hashlib
import os
import random

import numpy as np
import torch


def seed_globals(seed: int, *context: object) -> None:
    """Seed Python, numpy and torch.

    Args:
        seed: Seed of the run.
        *context: What tells this use from others (iteration, rank), so that the state is a function of it and resuming
            needs no saved random state.
    """
    if context:
        digest = hashlib.blake2b(repr((seed, *context)).encode(), digest_size=4).digest()
        seed = int.from_bytes(digest, 'little')
    seed %= 2**32
    random.seed(seed)
    np.random.seed(seed)
    # torch.manual_seed also queues seeds for every kind of device that is not in use, which takes a millisecond
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


def make_deterministic() -> None:
    """Ask torch for deterministic algorithms only; those that have none raise an error."""
    os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
