"""Tests that need a CUDA device; without one they are skipped."""

import os
from pathlib import Path

import pytest
import torch

from tests.cuda.device import tf32
from tests.pipelines.conftest import folders, kind  # noqa: F401

# As runs with deterministic algorithms do; looked up once, at the first product on the device.
os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    hidden = ': they are run by themselves, pytest tests/cuda' if os.environ.get('CUDA_VISIBLE_DEVICES') == '' else ''
    skip = pytest.mark.skip(reason=f'no CUDA device is visible{hidden}')
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _single_precision():
    """Products of float32 are in float32, as on a CPU; a run in the same process may have allowed less."""
    with tf32(False):
        yield
