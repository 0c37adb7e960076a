"""The DX policy: ``x_0`` predicted on a grid of times, or as a polynomial in time (pi-Flow, section 3.2)."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from lakonlab.models.diffusions.piflow_policies.base import Policy
from lakonlab.ops.rollout_schedule import RolloutSchedule
from lakonlab.ops.shapes import expand_like
from lakonlab.ops.time_shift import unwarp

#: What the points of an output are, see :class:`DXPolicy`.
MODES = ('grid', 'polynomial')


class DXPolicy(Policy):
    """Velocity towards an ``x_0`` that depends on time alone.

    Args:
        denoising_output: (B, N, C, *) velocities. ``x_src - sigma_src * output`` are N values of ``x_0``: in ``'grid'``
            mode at equally spaced schedule times, the first at the end of the segment and the last at the source,
            linearly interpolated; in ``'polynomial'`` mode the coefficients of powers of ``raw_src - raw_t``.
        x_t_src: State that the network saw, (B, C, *).
        sigma_t_src: Its noise level in (0, 1], (B,) or (B, 1, *1).
        segment_size: Length of a segment in schedule time in (0, 1]; fixed by training, see ``final_step_size_scale``.
        shift: Shift of the schedule the student was trained with.
        mode: ``'grid'`` or ``'polynomial'``.
        eps: Floor of the noise level and of the segment's length.

    Raises:
        ValueError: ``mode`` is neither of the two, or the output has the wrong shape.
    """

    variants = {
        'grid': {},
        'grid of a short segment': {'segment_size': 0.3, 'shift': 3.2},
        'polynomial': {'mode': 'polynomial', 'shift': 3.2},
    }

    def __init__(
        self,
        denoising_output: Tensor,
        x_t_src: Tensor,
        sigma_t_src: Tensor,
        segment_size: float = 1.0,
        shift: float = 1.0,
        mode: str = 'grid',
        eps: float = 1e-4,
    ):
        super().__init__(x_t_src, sigma_t_src, eps)
        if mode not in MODES:
            raise ValueError(f"policy_kwargs.mode={mode!r}: expected 'grid' or 'polynomial'")
        if not isinstance(denoising_output, Tensor) or (
            denoising_output.shape[:1] + denoising_output.shape[2:] != x_t_src.shape
        ):
            found = (
                tuple(denoising_output.shape)
                if isinstance(denoising_output, Tensor)
                else type(denoising_output).__name__
            )
            raise ValueError(
                f'the DX policy needs a tensor (B, N, C, *) for a state {tuple(x_t_src.shape)}, found {found}'
            )
        self.output = denoising_output.to(x_t_src.dtype)
        self.segment_size, self.shift, self.mode = segment_size, shift, mode

    @classmethod
    def output_shapes(cls, state_shape: tuple[int, ...], num_components: int) -> tuple[int, ...]:
        return (state_shape[0], num_components, *state_shape[1:])

    def _basis(self, sigmas: Tensor) -> Tensor:
        """Weights of the N values of ``x_0`` at noise levels (B, n), shape (B, n, N)."""
        num_points = self.output.shape[1]
        index = torch.arange(num_points, dtype=sigmas.dtype, device=sigmas.device)
        raw_src = unwarp(self.sigma_t_src.to(sigmas), self.shift)[:, None]
        raw_t = unwarp(sigmas, self.shift)
        if self.mode == 'polynomial':
            return (raw_src - raw_t)[..., None] ** index
        raw_dst = (raw_src - self.segment_size).clamp(min=0)
        segment = (raw_src - raw_dst).clamp(min=self.eps)
        position = ((raw_t - raw_dst) / segment).clamp(0, 1) * (num_points - 1)
        return (1 - (position[..., None] - index).abs()).clamp(min=0)

    def _plus_x_0(self, x: Tensor, weights: Tensor) -> Tensor:
        """``x + sum_n weights_n X_n`` for weights (B, N), reading the output once."""
        source = torch.addcmul(x, expand_like(weights.sum(dim=1), x), self.x_t_src)
        factors = (-weights * self.sigma_t_src.to(weights)[:, None]).to(x)
        output = self.output.flatten(2)
        return torch.baddbmm(source.flatten(1)[:, None], factors[:, None], output).reshape(x.shape)

    def pi(self, x_t: Tensor, sigma_t: Tensor) -> Tensor:
        sigma_t = sigma_t.reshape(-1)
        difference = self._plus_x_0(x_t, -self._basis(sigma_t[:, None])[:, 0])
        return difference / expand_like(sigma_t, x_t).clamp(min=self.eps)

    def rollout(self, x_start: Tensor, schedule: RolloutSchedule) -> Tensor:
        """Explicit Euler in one contraction: the velocity is linear in the state and in the output.

        With ``kappa = (sigma_next - sigma) / sigma`` a substep is ``x <- (1 + kappa) x - kappa x_0``, so the end is
        ``prod(1 + kappa) x_start - sum_j kappa_j prod_{i>j}(1 + kappa_i) x_0(sigma_j)``, whose factors the schedule
        alone decides.
        """
        sigmas = schedule.sigmas
        kappa = sigmas.diff(dim=1) / sigmas[:, :-1].clamp(min=self.eps)
        decay = (1 + kappa).flip(1).cumprod(1).flip(1)
        after = torch.cat([decay[:, 1:], torch.ones_like(decay[:, :1])], dim=1)
        weights = torch.bmm((-kappa * after)[:, None], self._basis(sigmas[:, :-1]))[:, 0]
        return self._plus_x_0(expand_like(decay[:, 0], x_start) * x_start, weights)

    def detach(self) -> DXPolicy:
        policy = copy.copy(self)
        policy.output, policy.x_t_src = self.output.detach(), self.x_t_src.detach()
        return policy
