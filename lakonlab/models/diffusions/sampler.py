"""Draws training times from a shifted schedule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lakonlab.ops.random_source import RandomSource, TorchSource
from lakonlab.ops.time_shift import shift_for, unwarp, warp
from lakonlab.registry import MODULES


@MODULES.register_module()
class ContinuousTimeStepSampler:
    """Continuous times, uniform or logit-normal in schedule time, shifted towards noise.

    Args:
        num_timesteps: Unit of ``t``: the network is given ``sigma * num_timesteps`` (1 or 1000).
        shift: Shift of the schedule.
        logit_normal_enable: Draw ``sigmoid(mean + std * N(0, 1))`` instead of U(0, 1].
        logit_normal_mean: See ``logit_normal_enable``.
        logit_normal_std: See ``logit_normal_enable``.
        use_dynamic_shifting: Take the shift from the length of the latent instead of ``shift``.
        base_seq_len: Latent pixels at which the logarithm of the dynamic shift is ``base_logshift``.
        max_seq_len: Latent pixels at which it is ``max_logshift``.
        base_logshift: See ``base_seq_len``.
        max_logshift: See ``max_seq_len``.
        dynamic_shifting_type: ``'exp'`` or ``'sqrt'``, see :func:`lakonlab.ops.time_shift.dynamic_shift`.
    """

    def __init__(
        self,
        num_timesteps: float = 1000,
        shift: float = 1.0,
        logit_normal_enable: bool = False,
        logit_normal_mean: float = 0.0,
        logit_normal_std: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_seq_len: int = 256,
        max_seq_len: int = 4096,
        base_logshift: float = 0.5,
        max_logshift: float = 1.15,
        dynamic_shifting_type: str = 'exp',
    ):
        if shift <= 0:
            raise ValueError(f'timestep_sampler.shift={shift}: expected a positive number')
        self.num_timesteps = num_timesteps
        self.logit_normal_enable = logit_normal_enable
        self.logit_normal_mean, self.logit_normal_std = logit_normal_mean, logit_normal_std
        self.shift_settings: dict[str, Any] = {
            'shift': shift,
            'use_dynamic_shifting': use_dynamic_shifting,
            'base_seq_len': base_seq_len,
            'max_seq_len': max_seq_len,
            'base_logshift': base_logshift,
            'max_logshift': max_logshift,
            'dynamic_shifting_type': dynamic_shifting_type,
        }

    def get_shift(self, seq_len: int | None = None) -> float:
        """Shift for a latent of ``seq_len`` pixels; the length matters only under dynamic shifting."""
        return shift_for(seq_len, **self.shift_settings)

    def warp_t(self, raw_t: Tensor, seq_len: int | None = None) -> Tensor:
        """Noise level of a schedule time."""
        return warp(raw_t, self.get_shift(seq_len))

    def unwarp_t(self, sigma: Tensor, seq_len: int | None = None) -> Tensor:
        """Schedule time of a noise level."""
        return unwarp(sigma, self.get_shift(seq_len))

    def __call__(
        self,
        batch_size: int,
        seq_len: int | None = None,
        warp_t: bool = True,
        scale_t: bool = True,
        raw_t_range: tuple[float, float] = (0.0, 1.0),
        source: RandomSource | None = None,
        device: torch.device | str = 'cpu',
    ) -> Tensor:
        """Draw one time per sample.

        Args:
            batch_size: Number of samples B.
            seq_len: Latent pixels of a sample, for dynamic shifting.
            warp_t: Shift the time; otherwise schedule time is returned.
            scale_t: Multiply by ``num_timesteps``.
            raw_t_range: Range of schedule time; the lower end is excluded.
            source: Source of the draw ``raw_t``.
            device: Device of the result. Times are best left on the host.

        Returns:
            (B,), float32.
        """
        source = source or TorchSource()
        low, high = raw_t_range
        if self.logit_normal_enable:
            normal = source.normal('raw_t', (batch_size,), device=device)
            t = (self.logit_normal_mean + self.logit_normal_std * normal).sigmoid() * (high - low) + low
        else:
            t = high - source.uniform('raw_t', (batch_size,), device=device) * (high - low)
        if warp_t:
            t = self.warp_t(t, seq_len)
        return t * self.num_timesteps if scale_t else t
