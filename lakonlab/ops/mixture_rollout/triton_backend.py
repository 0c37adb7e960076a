"""The backend for GPUs: one Triton kernel for a whole rollout, one for its gradient.

To debug the kernels without a GPU, set ``TRITON_INTERPRET=1`` before triton is imported: Triton then runs them in
Python on tensors of any device, slowly, and ``rollout_backend='triton'`` is accepted on the CPU.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import subprocess

import torch
from torch import Tensor

from lakonlab.ops.mixture_rollout import RolloutInputs

WORDS_PER_THREAD = 32
"""32-bit registers in which a thread keeps means; the gradient and the sums over K and C need 50 to 200 more of 255."""

SMALLEST_BLOCK = 8
"""Pixels in a sector, the 32 bytes that a GPU reads at once, in float32: fewer would waste bandwidth."""

LARGEST_BLOCK = 128

THREADS_PER_WARP = 32
LARGEST_WARPS = 16

logger = logging.getLogger(__name__)


def unavailable(device: torch.device) -> str | None:
    """Why the backend cannot be used on a device, or None. A failure of Triton to start is logged once."""
    if importlib.util.find_spec('triton') is None:
        return 'Triton is not installed (pip install triton)'
    from triton import knobs

    if knobs.runtime.interpret:
        return None
    if device.type != 'cuda':
        return 'the kernels are for GPUs (to debug them, TRITON_INTERPRET=1 runs them on the CPU)'
    if not torch.cuda.is_available():
        return 'torch finds no GPU'
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < (8, 0):
        return (
            f'Triton needs a GPU of compute capability 8.0 or later, and this one has {".".join(map(str, capability))}'
        )
    return _driver_failure()


def forward(inputs: RolloutInputs, lengths: tuple[int, ...]) -> Tensor:
    from lakonlab.ops.mixture_rollout.triton_kernels import forward_kernel

    result = torch.empty_like(inputs.offset)
    grid, sizes, constants, warps = _launch(inputs)
    with torch.cuda.device_of(result):
        counts = _on_device(lengths, result.device)
        forward_kernel[grid](*inputs, counts, result, *sizes, **constants, num_warps=warps)
    return result


def backward(inputs: RolloutInputs, lengths: tuple[int, ...], grad: Tensor) -> RolloutInputs:
    from lakonlab.ops.mixture_rollout.triton_kernels import backward_kernel

    batch_size, num_substeps, num_factors = inputs.coefficients.shape
    grid, sizes, constants, warps = _launch(inputs)
    images = [torch.empty_like(tensor) for tensor in inputs[:4]]
    states = grad.new_empty(batch_size, num_substeps, *grad.shape[1:])
    sums = grad.new_zeros(batch_size, sizes[0], num_substeps, num_factors)
    with torch.cuda.device_of(grad):
        counts = _on_device(lengths, grad.device)
        backward_kernel[grid](*inputs, counts, grad, states, *images, sums, *sizes, **constants, num_warps=warps)
    return RolloutInputs(*images, sums.sum(dim=1, dtype=torch.float64).to(grad.dtype))


def _launch(inputs: RolloutInputs) -> tuple[tuple[int], tuple[int, int, int], dict[str, int], int]:
    """Grid; programs per sample, pixels and substeps; compile-time constants and warps of a program."""
    batch_size, num_components, num_channels, num_pixels = inputs.means.shape
    constants, warps = program_shape(num_components, num_channels, num_pixels, inputs.means.element_size())
    programs = -(-num_pixels // constants['BLOCK'])
    return (batch_size * programs,), (programs, num_pixels, inputs.coefficients.shape[1]), constants, warps


def program_shape(
    num_components: int, num_channels: int, num_pixels: int, element_size: int
) -> tuple[dict[str, int], int]:
    """Compile-time constants of the kernels for K, C, P and bytes of a number; and the warps of a program.

    One warp takes as many pixels as its registers hold, for then no sum needs a barrier. Where not even the smallest
    useful block fits, more warps share it. In float32, K=32, C=4 and K=8, C=16 get 8 pixels and one warp, and K=8, C=64
    gets 8 pixels and four warps; ptxas for Hopper reports 80 to 95 registers forward, 190 to 245 backward, no spills.
    """
    components, channels = _power_of_two(num_components), _power_of_two(num_channels)
    words = components * channels * element_size // 4
    capacity = THREADS_PER_WARP * WORDS_PER_THREAD
    block = min(max(capacity // words, SMALLEST_BLOCK), LARGEST_BLOCK, _power_of_two(num_pixels))
    warps = min(max(block * words // capacity, 1), LARGEST_WARPS)
    constants = {
        'NUM_COMPONENTS': num_components,
        'NUM_CHANNELS': num_channels,
        'PADDED_COMPONENTS': components,
        'PADDED_CHANNELS': channels,
        'BLOCK': block,
        'COMPONENT_AXIS': int(components > channels),  # the longer axis is the one that threads share
    }
    return constants, warps


def _power_of_two(count: int) -> int:
    """The smallest that is not below the count."""
    return 1 << (count - 1).bit_length()


def _on_device(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """The lengths as a tensor; the host does not wait for a copy from pinned memory."""
    return torch.tensor(lengths, dtype=torch.int32, pin_memory=device.type == 'cuda').to(device, non_blocking=True)


@functools.cache
def _driver_failure() -> str | None:
    """Triton compiles a small C program when it starts: a compiler or Python's headers may be missing."""
    from triton.runtime import driver

    try:
        driver.active.get_current_target()
    except (RuntimeError, OSError, ImportError, AssertionError, subprocess.CalledProcessError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        logger.warning('Rollouts of Gaussian mixtures run in plain torch, several times slower: %s', reason)
        return reason
    return None
