"""What the losses of flow models share: named inputs, a loss per sample, rescaling, and logs by noise level."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class DiffusionLoss(nn.Module):
    """A loss that picks its inputs from a dict by the names in ``data_info``.

    A subclass implements :meth:`per_sample` and may add to :meth:`statistics`.

    Args:
        data_info: Argument of :meth:`per_sample` -> key of the dict of outputs.
        rescale_mode: ``'constant'`` multiplies by ``rescale_cfg['scale']``; None leaves the loss as it is.
        rescale_cfg: See ``rescale_mode``.
        log_cfgs: ``dict(type='quartile', prefix_name=..., total_timesteps=...)`` logs the loss of each quarter of the
            noise levels.
        loss_name: Name of the loss, for the default of ``prefix_name``.

    Raises:
        ValueError: An unknown mode or log type.
    """

    default_data_info: Mapping[str, str] = {}
    rescale_cfg_keys = ('scale',)
    log_cfgs_keys = ('type', 'prefix_name', 'total_timesteps')

    def __init__(
        self,
        data_info: Mapping[str, str] | None = None,
        rescale_mode: str | None = None,
        rescale_cfg: Mapping[str, Any] | None = None,
        log_cfgs: Mapping[str, Any] | None = None,
        loss_name: str = 'loss',
    ):
        super().__init__()
        if rescale_mode not in (None, 'constant'):
            raise ValueError(f"flow_loss.rescale_mode={rescale_mode!r}: expected None or 'constant'")
        self.data_info = {**self.default_data_info, **(data_info or {})}
        self.scale = float((rescale_cfg or {}).get('scale', 1.0)) if rescale_mode == 'constant' else 1.0
        self.loss_name = loss_name
        self.log_cfgs = dict(log_cfgs) if log_cfgs else None
        if self.log_cfgs is not None and self.log_cfgs.get('type') != 'quartile':
            raise ValueError(f"flow_loss.log_cfgs.type={self.log_cfgs.get('type')!r}: expected 'quartile'")
        self.log_vars: dict[str, Tensor] = {}

    @abstractmethod
    def per_sample(self, **inputs: Tensor) -> Tensor:
        """Loss of each sample before rescaling, (B,)."""

    def forward(self, outputs: Mapping[str, Tensor]) -> Tensor:
        """Mean loss of a batch.

        Args:
            outputs: The tensors named in ``data_info``, and ``timesteps`` (B,) if quartiles are logged.

        Raises:
            KeyError: A tensor is missing.
        """
        missing = set(self.data_info.values()) - set(outputs)
        if missing:
            raise KeyError(f'{type(self).__name__} needs {sorted(missing)}; it was given {sorted(outputs)}')
        inputs = {argument: outputs[key] for argument, key in self.data_info.items()}
        losses = self.per_sample(**inputs)
        self.log_vars = {}
        if self.log_cfgs is not None:
            total = self.log_cfgs.get('total_timesteps', 1000)
            quartile = (outputs['timesteps'].to(losses) * 4 / total).long().clamp(0, 3)
            prefix = self.log_cfgs.get('prefix_name', self.loss_name)
            self._log_quartiles(prefix, losses.detach(), quartile, inputs)
        return losses.mean() * self.scale

    def _log_quartiles(self, prefix: str, losses: Tensor, quartile: Tensor, inputs: Mapping[str, Tensor]) -> None:
        counts, sums = quartile_sums(losses, quartile)
        for i, value in enumerate(sums / counts.clamp(min=1)):
            self.log_vars[f'{prefix}_quartile_{i}'] = value


class RunningQuartileLoss(DiffusionLoss):
    """A loss whose quartile logs are running averages, kept in buffers so that they survive a resume.

    The first samples of a quartile count fully: with ``c`` new samples of ``total`` seen, the weight of the new mean is
    ``(1 - exp(-0.1 c)) / (1 - exp(-0.1 total))``.
    """

    momentum = 0.1
    #: Buffers that processes average among themselves after every step.
    averaged_buffers = ('quartile_loss', 'quartile_var', 'quartile_count')

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.log_cfgs is not None:
            self.register_buffer('quartile_loss', torch.zeros(4))
            self.register_buffer('quartile_var', torch.ones(4))
            self.register_buffer('quartile_count', torch.zeros(4))

    @abstractmethod
    def variance_per_sample(self, **inputs: Tensor) -> Tensor:
        """Predicted variance of each sample, (B,), to be logged beside the loss."""

    @torch.no_grad()
    def _log_quartiles(self, prefix, losses, quartile, inputs):
        finite = losses.isfinite()  # one bad sample must not spoil an average that lasts
        losses, quartile = losses[finite], quartile[finite]
        counts, sums = quartile_sums(losses, quartile)
        _, variance_sums = quartile_sums(self.variance_per_sample(**inputs).detach()[finite], quartile)
        self.quartile_count += counts
        weight = (1 - (-self.momentum * counts).exp()) / (1 - (-self.momentum * self.quartile_count).exp()).clamp(
            min=1e-4
        )
        for average, total in ((self.quartile_loss, sums), (self.quartile_var, variance_sums)):
            average += weight * (total / counts.clamp(min=1) - average)
        for i in range(4):
            self.log_vars[f'{prefix}_quartile_{i}'] = self.quartile_loss[i].clone()
            self.log_vars[f'{prefix}_var_quartile_{i}'] = self.quartile_var[i].clone()


def quartile_sums(values: Tensor, quartile: Tensor) -> tuple[Tensor, Tensor]:
    """Number of samples in each quartile and the sum of their values, (4,) each."""
    counts = torch.zeros(4, dtype=values.dtype, device=values.device)
    counts.index_add_(0, quartile, torch.ones_like(values))
    return counts, torch.zeros_like(counts).index_add_(0, quartile, values)
