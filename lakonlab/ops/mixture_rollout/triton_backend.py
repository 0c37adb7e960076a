"""The backend for GPUs: one Triton kernel for a whole rollout, one for its gradient.

To debug the kernels without a GPU, set ``TRITON_INTERPRET=1`` before triton is imported: Triton then runs them in
Python on tensors of any device, slowly, and ``rollout_backend='triton'`` is accepted on the CPU.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import subprocess
from typing import NamedTuple

import torch
from torch import Tensor

from lakonlab.ops.mixture_rollout import RolloutInputs

WORDS_PER_THREAD = 64
"""32-bit registers in which a thread keeps means. The gradient needs as many again and some more, and has 255."""

SECTOR_PIXELS = 8
"""Pixels in the 32 bytes that a GPU reads from memory at once, in float32: the smallest useful block."""

LARGEST_BLOCK = 128

logger = logging.getLogger(__name__)


def unavailable(device: torch.device) -> str | None:
    """Why the backend cannot be used on a device, or None. A failure of Triton is logged once."""
    if importlib.util.find_spec('triton') is None:
        return "Triton is not installed (pip install 'triton>=3.8.0')"
    from triton import knobs

    if knobs.runtime.interpret:
        return None
    if device.type != 'cuda':
        return 'the kernels are for GPUs (TRITON_INTERPRET=1 runs them on the CPU, to debug them)'
    if not torch.cuda.is_available():
        return 'torch finds no GPU'
    return _driver_failure()


def forward(inputs: RolloutInputs, lengths: tuple[int, ...]) -> Tensor:
    from lakonlab.ops.mixture_rollout.triton_kernels import forward_kernel

    result = torch.empty_like(inputs.offset)
    launch = _launch(inputs)
    with torch.cuda.device_of(result):
        counts = _on_device(lengths, result.device)
        forward_kernel[launch.grid](*inputs, counts, result, *launch.sizes, *launch.constants, num_warps=launch.warps)
    return result


def backward(inputs: RolloutInputs, lengths: tuple[int, ...], grad: Tensor) -> RolloutInputs:
    from lakonlab.ops.mixture_rollout.triton_kernels import backward_kernel

    grads = RolloutInputs(*(torch.empty_like(tensor) for tensor in inputs))
    launch = _launch(inputs)
    batch_size, num_substeps, num_factors = inputs.coefficients.shape
    _, num_channels, num_pixels = inputs.offset.shape
    states = grad.new_empty(batch_size, num_substeps, num_channels, num_pixels)
    partial = grad.new_zeros(batch_size, launch.programs, num_substeps, num_factors)
    with torch.cuda.device_of(grad):
        counts = _on_device(lengths, grad.device)
        backward_kernel[launch.grid](
            *inputs, counts, grad, states, *grads[:4], partial, *launch.sizes, *launch.constants, num_warps=launch.warps
        )
    total = partial.sum(dim=1, dtype=torch.float64)
    return grads._replace(coefficients=total.to(inputs.coefficients.dtype))


class Launch(NamedTuple):
    """How a problem is cut into programs."""

    grid: tuple[int]
    programs: int
    """Programs per sample."""
    sizes: tuple[int, int, int]
    """Programs per sample, pixels, substeps."""
    constants: tuple[int, int, int, int, int]
    """Components, channels, both as powers of two, pixels of a block."""
    warps: int


def _launch(inputs: RolloutInputs) -> Launch:
    batch_size, num_components, num_channels, num_pixels = inputs.means.shape
    padded_components, padded_channels, block, warps = block_shape(
        num_components, num_channels, num_pixels, inputs.means.element_size()
    )
    programs = -(-num_pixels // block)
    return Launch(
        grid=(batch_size * programs,),
        programs=programs,
        sizes=(programs, num_pixels, inputs.coefficients.shape[1]),
        constants=(num_components, num_channels, padded_components, padded_channels, block),
        warps=warps,
    )


def block_shape(
    num_components: int, num_channels: int, num_pixels: int, element_size: int
) -> tuple[int, int, int, int]:
    """Components and channels as powers of two, pixels of a block, and warps of a program.

    One warp holds as many pixels as fit its registers: its sums need no barrier. Where not even a memory sector of
    pixels fits, more warps share the block. In float32: K=32, C=4 and K=8, C=16 give 16 pixels and one warp; K=8, C=64
    gives 8 pixels and two warps.
    """
    components, channels = _power_of_two(num_components), _power_of_two(num_channels)
    words = components * channels * element_size // 4
    fitting = max(32 * WORDS_PER_THREAD // words, SECTOR_PIXELS)
    block = min(fitting, LARGEST_BLOCK, _power_of_two(num_pixels))
    warps = min(max(block * words // (32 * WORDS_PER_THREAD), 1), 16)
    return components, channels, block, warps


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()


def _on_device(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """The lengths as a tensor; the copy from pinned memory does not make the host wait."""
    on_gpu = device.type == 'cuda'
    return torch.tensor(lengths, dtype=torch.int32, pin_memory=on_gpu).to(device, non_blocking=True)


@functools.cache
def _driver_failure() -> str | None:
    from triton.runtime import driver

    try:
        target = driver.active.get_current_target()
    except (RuntimeError, OSError, ImportError, AssertionError, subprocess.CalledProcessError) as error:
        # Triton compiles a small C program on first use, so that this shows a missing compiler or Python header.
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        logger.warning('Rollouts of Gaussian mixtures run in plain torch, several times slower: %s', reason)
        return reason
    if target.backend == 'cuda' and target.arch < 80:
        return f'Triton supports compute capability 8.0 and later, and this GPU has {target.arch / 10}'
    return None
