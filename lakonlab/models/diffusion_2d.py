"""Distributions of points in the plane: toy problems on which everything about a flow model can be seen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lakonlab.models.base_diffusion import BaseDiffusion
from lakonlab.models.training_step import Around, alone
from lakonlab.ops.random_source import RandomSource, TorchSource
from lakonlab.registry import MODELS

NUM_COORDINATES = 2


@MODELS.register_module()
class Diffusion2D(BaseDiffusion):
    """An unconditional model of points (x, y), which it treats as images of one pixel with two channels.

    A batch holds ``x`` (B, 2); for sampling it may hold ``noise`` (B, 2).

    Args:
        diffusion: Config of what is trained.
        diffusion_use_ema: Keep a moving average of it.
        tie_ema: Share the frozen parameters of student and EMA.
        inference_only: Let the EMA be the student itself.
        train_cfg: The shared training section.
        test_cfg: The shared sampling section.
    """

    def __init__(
        self,
        diffusion: dict,
        diffusion_use_ema: bool = False,
        tie_ema: bool = True,
        inference_only: bool = False,
        train_cfg: Mapping[str, Any] | None = None,
        test_cfg: Mapping[str, Any] | None = None,
    ):
        super().__init__(
            diffusion,
            diffusion_use_ema,
            tie_ema=tie_ema,
            inference_only=inference_only,
            train_cfg=train_cfg,
            test_cfg=test_cfg,
        )

    def train_minibatch(
        self,
        data: dict[str, Any],
        running_status: Mapping[str, int],
        source: RandomSource,
        loss_factor: float,
        around: Around = alone,
    ) -> dict[str, Tensor]:
        """See the base class, and the class for the keys of a micro-batch."""
        points = as_pixels(data['x'].to(self.device), 'x')
        return self.backward_losses(points, source, loss_factor, around, running_status=running_status)

    @torch.no_grad()
    def val_step(
        self,
        data: dict[str, Any],
        role: str | None = None,
        test_cfg_override: Mapping[str, Any] | None = None,
        source: RandomSource | None = None,
        show_pbar: bool = False,
    ) -> dict[str, Any]:
        """Sample as many points as a batch has.

        Args:
            data: See the class; of ``x`` only the length is used.
            role: ``'student'`` or ``'ema'``; None for the EMA if there is one.
            test_cfg_override: Overrides of the sampling section.
            source: Source of random numbers of the batch: ``noise`` if the batch brings none, and those of the sampler.
            show_pbar: Show a progress bar.

        Returns:
            ``num_samples``, the points ``pred_x`` (B, 2), and ``nfe``, the network evaluations of a sample.

        Raises:
            ValueError: The batch holds neither ``noise`` nor ``x``, or not as (B, 2).
        """
        source = source or TorchSource()
        diffusion = self.role(role)
        if data.get('noise') is not None:
            noise = as_pixels(data['noise'].to(self.device), 'noise')
        elif data.get('x') is not None:
            noise = source.normal('noise', (len(data['x']), NUM_COORDINATES, 1, 1), device=self.device)
        else:
            raise ValueError(f'the batch holds neither noise nor x to say how many points to sample: {sorted(data)}')
        points = diffusion(noise=noise, test_cfg_override=test_cfg_override, source=source, show_pbar=show_pbar)
        nfe = diffusion.num_function_evaluations(test_cfg_override)
        return {'num_samples': len(points), 'pred_x': points.flatten(1), 'nfe': nfe}


def as_pixels(points: Tensor, name: str) -> Tensor:
    """Points (B, 2) as one-pixel images (B, 2, 1, 1).

    Args:
        points: The points.
        name: What they are called in the batch, for messages.

    Raises:
        ValueError: They have another shape.
    """
    if points.dim() != 2 or points.shape[1] != NUM_COORDINATES:
        raise ValueError(f'{name} has shape {tuple(points.shape)}: expected (B, {NUM_COORDINATES})')
    return points[:, :, None, None]
