"""The substeps of a rollout, decided once on the host before any of them is taken."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lakonlab.ops.time_shift import warp


class RolloutSchedule(NamedTuple):
    """Noise levels of the explicit Euler substeps of each sample.

    They are host tensors in double precision, so that the number of substeps is known without asking the device and
    the noise levels carry no accumulated rounding.
    """

    sigmas: Tensor
    """(B, num_substeps + 1), float64 on the CPU, decreasing; constant after the last substep of a sample."""
    counts: Tensor
    """(B,), int64 on the CPU: ``round((raw_start - raw_end) * total_substeps)``, which may be 0."""

    @property
    def num_substeps(self) -> int:
        """Substeps of the longest sample of the batch, at least 1."""
        return self.sigmas.shape[1] - 1


def rollout_schedule(
    raw_start: Tensor, raw_end: Tensor, total_substeps: int, shift: float, rounding: str = 'round'
) -> RolloutSchedule:
    """Substeps from ``raw_start`` to ``raw_end``, uniform in schedule time.

    Args:
        raw_start: Schedule time of the first state of each sample, (B,), in [0, 1].
        raw_end: Schedule time of the last state, (B,), at most ``raw_start``.
        total_substeps: Number of substeps that would cover the whole schedule; each sample takes its share, at least 1.
        shift: Shift of the schedule, see :func:`lakonlab.ops.time_shift.warp`.
        rounding: ``'round'`` the share to the nearest number, half to even (as published up to 0.1.2), or ``'ceil'``
            (0.2.0).

    Raises:
        ValueError: ``rounding`` is neither of the two.
    """
    if rounding not in ('round', 'ceil'):
        raise ValueError(f"rounding={rounding!r}: expected 'round' or 'ceil'")
    raw_start, raw_end = (raw.detach().to(device='cpu', dtype=torch.float64) for raw in (raw_start, raw_end))
    share = (raw_start - raw_end) * total_substeps
    counts = (share.round() if rounding == 'round' else share.ceil()).long()
    num_substeps = counts.clamp(min=1)
    position = torch.arange(int(num_substeps.max()) + 1, dtype=torch.float64)
    fraction = (position / num_substeps[:, None]).clamp(max=1)
    raw = torch.lerp(raw_start[:, None], raw_end[:, None], fraction).clamp(min=0)
    return RolloutSchedule(sigmas=warp(raw, shift), counts=counts)
