"""The map between schedule time ``raw_t`` and noise level ``sigma``, both in [0, 1].

Shifting the schedule towards noise for large images follows Esser et al., "Scaling Rectified Flow Transformers for
High-Resolution Image Synthesis" (2024), section 5.3.2.
"""

from __future__ import annotations

import math

from torch import Tensor


def warp(raw_t: Tensor, shift: float) -> Tensor:
    """Noise level of a schedule time: ``sigma = shift * raw_t / (1 + (shift - 1) * raw_t)``.

    Args:
        raw_t: Schedule time in [0, 1], any shape.
        shift: Positive; 1 leaves the time as it is, larger values spend more of the schedule at high noise.
    """
    return shift * raw_t / (1 + (shift - 1) * raw_t)


def unwarp(sigma: Tensor, shift: float) -> Tensor:
    """Schedule time of a noise level, the inverse of :func:`warp`."""
    return sigma / (shift + (1 - shift) * sigma)


def dynamic_shift(
    seq_len: int,
    base_seq_len: int = 256,
    max_seq_len: int = 4096,
    base_logshift: float = 0.5,
    max_logshift: float = 1.15,
    kind: str = 'exp',
) -> float:
    """Shift for an image of ``seq_len`` latent pixels, fixed by its values at two lengths.

    Args:
        seq_len: Product of the spatial sizes of the latent (the pipelines of FLUX and Qwen-Image count tokens instead).
        base_seq_len: Length at which the shift is ``exp(base_logshift)``.
        max_seq_len: Length at which the shift is ``exp(max_logshift)``.
        base_logshift: See ``base_seq_len``.
        max_logshift: See ``max_seq_len``.
        kind: ``'exp'`` interpolates the logarithm of the shift linearly in the length (FLUX), ``'sqrt'`` the shift
            itself linearly in the square root of the length (the signal-to-noise argument of the paper above).

    Raises:
        ValueError: ``kind`` is neither of the two.
    """
    if kind == 'exp':
        slope = (max_logshift - base_logshift) / (max_seq_len - base_seq_len)
        return math.exp(base_logshift + (seq_len - base_seq_len) * slope)
    if kind == 'sqrt':
        low, high = math.exp(base_logshift), math.exp(max_logshift)
        position = (math.sqrt(seq_len) - math.sqrt(base_seq_len)) / (math.sqrt(max_seq_len) - math.sqrt(base_seq_len))
        return low + (high - low) * position
    raise ValueError(f"dynamic_shifting_type={kind!r}: expected 'exp' or 'sqrt'")


def shift_for(
    seq_len: int | None, *, shift: float, use_dynamic_shifting: bool, dynamic_shifting_type: str, **lengths: float
) -> float:
    """The shift that a set of shift settings gives a latent of ``seq_len`` pixels.

    Raises:
        ValueError: Dynamic shifting without a length.
    """
    if not use_dynamic_shifting:
        return shift
    if seq_len is None:
        raise ValueError('use_dynamic_shifting=True needs seq_len, the number of latent pixels')
    return dynamic_shift(seq_len, kind=dynamic_shifting_type, **lengths)


def stretch_to_terminal(sigmas: Tensor, terminal_sigma: float) -> Tensor:
    """Stretch a decreasing grid of noise levels so that its last one becomes ``terminal_sigma``.

    Args:
        sigmas: Shape (num_steps,), decreasing, without the final zero.
        terminal_sigma: The wanted last value, in (0, 1).
    """
    return 1 - (1 - sigmas) * (1 - terminal_sigma) / (1 - sigmas[-1])
