"""The backend for CPUs: ``kernel.cpp``, compiled on first use where there is a C++ compiler."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from lakonlab.cache import cache_directory
from lakonlab.ops.mixture_rollout import RolloutInputs

KERNEL = Path(__file__).with_name('kernel.cpp')
ARCHITECTURE_FLAGS = {
    'AVX2': ('-mavx2', '-mfma'),
    'AVX512': ('-mavx512f', '-mavx512dq', '-mavx512bw', '-mavx512vl', '-mfma'),
}
"""Instruction set that torch found -> compiler flags. Named sets, so that a cache on a shared disk fits every node."""

logger = logging.getLogger(__name__)


def unavailable(device: torch.device) -> str | None:
    """Why the backend cannot be used on a device, or None. The first call compiles it; a failure is logged once."""
    if device.type != 'cpu':
        return 'the kernel is for CPUs'
    return _library_or_reason()[1]


@torch.compiler.disable
def forward(inputs: RolloutInputs, lengths: tuple[int, ...]) -> Tensor:
    result = torch.empty_like(inputs.offset)
    _call('forward', inputs, lengths, result)
    return result


@torch.compiler.disable
def backward(inputs: RolloutInputs, lengths: tuple[int, ...], grad: Tensor) -> RolloutInputs:
    grads = RolloutInputs(*(torch.empty_like(tensor) for tensor in inputs))
    batch_size, num_substeps, num_factors = inputs.coefficients.shape
    chunks = _library_or_reason()[0].mixture_rollout_chunks(inputs.means.shape[-1], inputs.means.element_size())
    partial = torch.empty(batch_size, chunks, num_substeps, num_factors, dtype=torch.float64)
    _call('backward', inputs, lengths, grad, *grads[:4], partial)
    return grads._replace(coefficients=partial.sum(dim=1).to(inputs.coefficients.dtype))


def _call(name: str, inputs: RolloutInputs, lengths: tuple[int, ...], *arrays: Tensor) -> None:
    library = _library_or_reason()[0]
    suffix = {torch.float32: 'f32', torch.float64: 'f64'}[inputs.means.dtype]
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in inputs]
    counts = (ctypes.c_int64 * len(lengths))(*lengths)
    sizes = [ctypes.c_int64(size) for size in (*inputs.means.shape, inputs.coefficients.shape[1])]
    outputs = [ctypes.c_void_p(tensor.data_ptr()) for tensor in arrays]
    function = getattr(library, f'mixture_rollout_{name}_{suffix}')
    function(*pointers, counts, *sizes, *outputs, ctypes.c_int(torch.get_num_threads()))


@functools.cache
def _library_or_reason() -> tuple[ctypes.CDLL | None, str | None]:
    try:
        library = ctypes.CDLL(str(library_path()))
    except (OSError, RuntimeError, ImportError, subprocess.SubprocessError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        logger.warning('Rollouts of Gaussian mixtures run in plain torch, about 5 times slower: %s', reason)
        return None, reason
    library.mixture_rollout_chunks.restype = ctypes.c_int64
    library.mixture_rollout_chunks.argtypes = [ctypes.c_int64, ctypes.c_int64]
    return library, None


def library_path() -> Path:
    """The compiled kernel in the cache, compiled now if it is not there.

    The cache is ``$LAKONLAB_CACHE_DIR``, by default ``~/.cache/lakonlab``. Processes may compile at the same time: each
    does so in a folder of its own and publishes the result by a rename.

    Raises:
        RuntimeError: There is no compiler, or it failed.
        OSError: The cache cannot be written.
    """
    flags = ['-O3', '-std=c++17', *ARCHITECTURE_FLAGS.get(torch.backends.cpu.get_cpu_capability(), ())]
    key = hashlib.blake2b(
        '\0'.join([KERNEL.read_text(), *flags, platform.system(), platform.machine()]).encode(), digest_size=8
    ).hexdigest()
    cache = cache_directory() / 'kernels'
    path = cache / f'mixture_rollout-{key}.so'
    if path.exists():
        return path
    compiler = os.environ.get('CXX') or next(filter(shutil.which, ('c++', 'g++', 'clang++')), None)
    if compiler is None or shutil.which(compiler) is None:
        raise RuntimeError('no C++ compiler was found (install g++ or clang++, or set CXX)')
    from torch.utils import cpp_extension

    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder, _ninja_on_the_path():
        logger.info('Compiling the rollout kernel (once)')
        openmp = [] if platform.system() == 'Darwin' else ['-fopenmp']
        cpp_extension.load(
            f'mixture_rollout_{key}',
            [str(KERNEL)],
            extra_cflags=[*flags, *openmp],
            extra_ldflags=openmp,
            build_directory=folder,
            is_python_module=False,
        )
        os.replace(Path(folder) / f'mixture_rollout_{key}.so', path)
    return path


@contextmanager
def _ninja_on_the_path() -> Iterator[None]:
    """cpp_extension looks for the program ninja, which pip puts beside the interpreter of the environment."""
    before = os.environ.get('PATH', '')
    os.environ['PATH'] = os.pathsep.join([before, str(Path(sys.executable).parent)])
    try:
        yield
    finally:
        os.environ['PATH'] = before
