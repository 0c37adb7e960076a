"""What a policy is: a velocity field in closed form, made from one network output and valid along one segment.

A policy is a value. ``detach``, ``temperature`` and ``dropout`` return new policies; nothing is changed in place.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from lakonlab.ops.random_source import RandomSource
from lakonlab.ops.rollout_schedule import RolloutSchedule, rollout_schedule
from lakonlab.ops.shapes import expand_like


class Policy(ABC):
    """A velocity field ``pi(x_t, sigma_t)`` that an ODE solver follows without calling the network again.

    A subclass implements :meth:`pi`, :meth:`detach` and :meth:`output_shapes`, and overrides :meth:`rollout` where its
    algebra allows a faster way than the plain loop. It is listed in
    :data:`lakonlab.models.diffusions.piflow_policies.POLICY_CLASSES`.

    Args:
        x_t_src: State that the network saw, (B, C, *).
        sigma_t_src: Its noise level in (0, 1], (B,) or (B, 1, *1).
        eps: Noise levels are floored at this value wherever they divide.
    """

    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {'default': {}}
    """Name -> ``policy_kwargs``: the settings between which the arithmetic differs. The tests of the interface run over
    all of them."""

    def __init__(self, x_t_src: Tensor, sigma_t_src: Tensor, eps: float):
        self.x_t_src = x_t_src
        self.sigma_t_src = sigma_t_src.reshape(-1)
        self.eps = eps

    @classmethod
    @abstractmethod
    def output_shapes(
        cls, state_shape: tuple[int, ...], num_components: int
    ) -> dict[str, tuple[int, ...]] | tuple[int, ...]:
        """Shapes of the network output that the policy is made from.

        Args:
            state_shape: Shape (B, C, *) of the state.
            num_components: What there may be several of: components K of a mixture, values N of ``x_0``.

        Returns:
            Name -> shape for an output that is a dict of tensors, or the one shape. Every real value is allowed; in a
            tensor called ``logweights`` also ``-inf``, though not for all components of a pixel.
        """

    @abstractmethod
    def pi(self, x_t: Tensor, sigma_t: Tensor) -> Tensor:
        """Velocity at a state.

        Args:
            x_t: State, (B, C, *).
            sigma_t: Its noise level in [0, ``sigma_t_src``], (B,) or (B, 1, *1).

        Returns:
            Velocity ``noise - x_0``, (B, C, *).
        """

    @abstractmethod
    def detach(self) -> Policy:
        """The same policy without gradients."""

    def _wide(self, *values: Tensor) -> list[Tensor]:
        """Noise levels and other numbers per sample, on the device of the state: double precision costs nothing there
        and keeps differences such as ``1 - sigma_t / sigma_src`` exact."""
        device = self.x_t_src.device
        return [
            value.to(device=device, dtype=torch.float32 if device.type == 'mps' else torch.float64) for value in values
        ]

    def temperature(self, temperature: float) -> Policy:
        """A policy that samples more conservatively, for ``temperature`` in (0, 1).

        Raises:
            TypeError: This kind of policy has no temperature.
        """
        raise TypeError(f'{type(self).__name__} has no temperature: leave `temperature` out of test_cfg')

    def dropout(self, probability: float, source: RandomSource) -> Policy:
        """A policy in which parts of the prediction are dropped at random, sample by sample.

        Raises:
            TypeError: This kind of policy has nothing to drop.
        """
        raise TypeError(f'{type(self).__name__} has no components to drop: leave `policy_dropout` out of train_cfg')

    def rollout(self, x_start: Tensor, schedule: RolloutSchedule) -> Tensor:
        """Follow the policy with explicit Euler substeps: ``x += pi(x, sigma) * (sigma_next - sigma)``.

        Args:
            x_start: State at the first noise level of the schedule, (B, C, *); not necessarily the source.
            schedule: Noise levels of the substeps.

        Returns:
            State at the end of the schedule, (B, C, *).
        """
        return euler_rollout(self, x_start, schedule)

    def average_velocity(
        self,
        x_start: Tensor,
        raw_start: Tensor,
        raw_end: Tensor,
        total_substeps: int,
        shift: float,
        rounding: str = 'round',
        min_sigma_interval: float = 1e-4,
    ) -> Tensor:
        """Mean velocity of a rollout from ``raw_start`` to ``raw_end``.

        Where less than two substeps fit, it is the velocity at the start.

        Args:
            x_start: State at ``raw_start``, (B, C, *).
            raw_start: Schedule time in [0, 1], (B,).
            raw_end: Schedule time, at most ``raw_start``, (B,).
            total_substeps: See :func:`rollout_schedule`.
            shift: See :func:`rollout_schedule`.
            rounding: See :func:`rollout_schedule`.
            min_sigma_interval: Floor of the interval of noise levels that divides the displacement.

        Returns:
            Velocity, (B, C, *).
        """
        schedule = rollout_schedule(raw_start, raw_end, total_substeps, shift, rounding)
        is_local = schedule.counts < 2
        if is_local.all():
            return self.pi(x_start, schedule.sigmas[:, 0])
        x_end = self.rollout(x_start, schedule)
        interval = (schedule.sigmas[:, 0] - schedule.sigmas[:, -1]).clamp(min=min_sigma_interval)
        u = (x_start - x_end) / expand_like(interval, x_start)
        if is_local.any():
            mask = is_local.to(x_start.device).reshape(-1, *([1] * (x_start.dim() - 1)))
            u = torch.where(mask, self.pi(x_start, schedule.sigmas[:, 0]), u)
        return u


def euler_rollout(policy: Policy, x_start: Tensor, schedule: RolloutSchedule) -> Tensor:
    """The plain loop: one evaluation of the policy per substep. The reference for faster ways."""
    x_t = x_start
    for i in range(schedule.num_substeps):
        sigma_t, sigma_next = schedule.sigmas[:, i], schedule.sigmas[:, i + 1]
        x_t = x_t + policy.pi(x_t, sigma_t) * expand_like(sigma_next - sigma_t, x_t)
    return x_t
