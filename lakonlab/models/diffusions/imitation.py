"""pi-ID, policy-based imitation distillation, within one segment (pi-Flow, section 3.3 and algorithm 1).

The student's own detached policy is rolled out to random intermediate states; the teacher says its velocity there; the
live policy's velocity, averaged over a short window, is to equal it. A schedule may mix in stretches that follow the
teacher instead (``teacher_ratio``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lakonlab.models.diffusions.piflow_policies import Policy
from lakonlab.ops.random_source import RandomSource
from lakonlab.ops.rollout_schedule import rollout_schedule
from lakonlab.ops.shapes import expand_like
from lakonlab.ops.time_shift import warp
from lakonlab.phases import phase


class ImitationPairs(NamedTuple):
    """The pairs of one segment, M intermediate states of B samples, concatenated along the batch."""

    u_pred: Tensor
    """Velocity of the live policy, (M * B, C, *)."""
    u_teacher: Tensor
    """Velocity of the teacher, (M * B, C, *), without gradient."""
    sigmas: Tensor
    """Noise level of the states, (M * B,), float64 on the host."""
    x_last: Tensor
    """State where the walk ended, (B, C, *)."""
    raw_last: Tensor
    """Its schedule time, (B,)."""


def imitate_segment(
    policy: Policy,
    explorer: Policy,
    teacher: Callable[[Tensor, Tensor], Tensor],
    x_src: Tensor,
    raw_src: Tensor,
    segment_size: Tensor,
    *,
    num_intermediate_states: int,
    total_substeps: int,
    shift: float,
    window_substeps: int = 0,
    teacher_ratio: float = 0.0,
    batch_teacher: bool = True,
    rounding: str = 'round',
    eps: float = 1e-4,
    source: RandomSource,
) -> ImitationPairs:
    """Walk down a segment, asking the teacher at M random states.

    Args:
        policy: The live policy, whose velocity is compared.
        explorer: The detached policy (with components dropped) that moves the state.
        teacher: Gives the velocity at states (n * B, C, *) and noise levels (n * B,), n copies of the batch in a row.
        x_src: State at the start of the segment, (B, C, *).
        raw_src: Its schedule time in (0, 1], (B,), on the host.
        segment_size: Length of the segment in schedule time, (B,), on the host.
        num_intermediate_states: M.
        total_substeps: Substeps per unit of schedule time.
        shift: Shift of the schedule.
        window_substeps: Length of the window of the averaged velocity beyond the stretch that follows the teacher.
        teacher_ratio: Share in [0, 1] of the segment that follows the teacher.
        batch_teacher: Ask the teacher at all states in one call where they do not depend on its answers, that is, where
            ``teacher_ratio`` is 0.
        rounding: See :func:`rollout_schedule`.
        eps: Floor of the interval of noise levels in an averaged velocity.
        source: Source of the draws ``student_intervals`` (B, M) and ``teacher_intervals`` (B, M - 1).
    """
    m = num_intermediate_states
    raw_src, segment_size = raw_src.double(), segment_size.double()
    batch_size = len(raw_src)
    num_substeps = (segment_size * total_substeps).round().clamp(min=1)
    window = torch.minimum(window_substeps * segment_size / num_substeps, segment_size)
    free = (segment_size - window)[:, None]

    draw_dtype = torch.promote_types(x_src.dtype, torch.float32)
    student_draw = source.uniform('student_intervals', (batch_size, m), draw_dtype).double()
    student_marks = (student_draw * ((1 - teacher_ratio) * free)).sort(dim=1).values
    student_intervals = student_marks.diff(dim=1, prepend=torch.zeros_like(free))
    teacher_draw = source.uniform('teacher_intervals', (batch_size, m - 1), draw_dtype).double()
    teacher_marks = teacher_draw.sort(dim=1).values
    teacher_intervals = (
        teacher_marks.diff(dim=1, prepend=torch.zeros_like(free), append=torch.ones_like(free)) * teacher_ratio * free
    )

    ask_later = batch_teacher and teacher_ratio == 0
    x_t, raw_t = x_src, raw_src
    u_pred, u_teacher, states, sigmas = [], [], [], []
    for student_interval, teacher_interval in zip(student_intervals.unbind(1), teacher_intervals.unbind(1)):
        raw_a = (raw_t - student_interval).clamp(min=0)
        raw_b = (raw_a - teacher_interval).clamp(min=0)
        sigma_a, sigma_b = warp(raw_a, shift), warp(raw_b, shift)
        with phase('rollout'):
            with torch.no_grad():
                x_t = explorer.rollout(x_t, rollout_schedule(raw_t, raw_a, total_substeps, shift, rounding))
            u_pred.append(
                policy.average_velocity(x_t, raw_a, (raw_b - window).clamp(min=0), total_substeps, shift, rounding, eps)
            )
        states.append(x_t)
        sigmas.append(sigma_a)
        if not ask_later:
            u_teacher.append(teacher(x_t, sigma_a))
            x_t = x_t + u_teacher[-1] * expand_like(sigma_b - sigma_a, x_t)
        raw_t = raw_b
    if ask_later:
        u_teacher.append(teacher(torch.cat(states), torch.cat(sigmas)))
    return ImitationPairs(torch.cat(u_pred), torch.cat(u_teacher), torch.cat(sigmas), x_t, raw_t)
