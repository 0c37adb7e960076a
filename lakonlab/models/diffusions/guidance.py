"""Classifier-free guidance of a velocity."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lakonlab.ops.shapes import batch_size_of


def classifier_free_guidance(
    u_positive: Tensor, u_negative: Tensor, scale: float, orthogonal: float = 0.0, axis: Tensor | None = None
) -> Tensor:
    """Push the velocity away from that of the negative condition: ``u_pos + (scale - 1) * (u_pos - u_neg)``.

    Args:
        u_positive: Velocity under the condition, (B, C, *).
        u_negative: Velocity under the negative condition, same shape.
        scale: Guidance scale w; 1 is no guidance (Ho & Salimans, "Classifier-Free Diffusion Guidance", 2022).
        orthogonal: Share in [0, 1] of the component of the difference along ``axis`` that is removed, as in Sadat et
            al., "Eliminating Oversaturation and Artifacts of High Guidance Scales in Diffusion Models" (2024).
        axis: Direction of that component, (B, C, *); the published choice is the predicted ``x_0``.
    """
    bias = (scale - 1) * (u_positive - u_negative)
    if orthogonal and axis is not None:
        bias = remove_parallel(bias, axis, orthogonal)
    return u_positive + bias


def remove_parallel(bias: Tensor, axis: Tensor, share: float) -> Tensor:
    """Remove a share of the component of each sample's ``bias`` along ``axis``, both (B, ...)."""
    dims = tuple(range(1, axis.dim()))
    along = (bias * axis).sum(dims, keepdim=True) / axis.square().sum(dims, keepdim=True).clamp(min=1e-6)
    return bias - share * along * axis


def check_guided_conditions(conditions: Mapping[str, Any], num_states: int, guidance_scale: float | None) -> None:
    """Make sure that conditions are for twice as many samples as there are states, the negative ones first.

    Raises:
        ValueError: They are not.
    """
    num_conditions = batch_size_of(conditions) if conditions else 2 * num_states
    if num_conditions != 2 * num_states:
        raise ValueError(
            f'guidance_scale={guidance_scale} needs conditions for {2 * num_states} samples, the negative ones first; '
            f'found {num_conditions} for {num_states} states'
        )
