"""Negative log-likelihood under one Gaussian per pixel."""

from __future__ import annotations

import math

from torch import Tensor

from lakonlab.models.losses.base import RunningQuartileLoss
from lakonlab.registry import MODULES


@MODULES.register_module()
class DiffusionNLLLoss(RunningQuartileLoss):
    """``mean(0.5 ((pred - target) / std)^2 + log std + 0.5 log(2 pi))``; arguments of :class:`DiffusionLoss`."""

    default_data_info = {'pred': 'u_t_pred', 'target': 'u_t', 'logstd': 'logstd'}

    def __init__(self, data_info=None, rescale_mode=None, rescale_cfg=None, log_cfgs=None, loss_name='loss_nll'):
        super().__init__(data_info, rescale_mode, rescale_cfg, log_cfgs, loss_name)

    def per_sample(self, pred: Tensor, target: Tensor, logstd: Tensor) -> Tensor:
        """Loss of each sample for tensors (B, C, *); ``logstd`` broadcasts."""
        nll = 0.5 * ((pred - target) * (-logstd).exp()).square() + logstd + 0.5 * math.log(2 * math.pi)
        return nll.flatten(1).mean(dim=1)

    def variance_per_sample(self, pred: Tensor, target: Tensor, logstd: Tensor) -> Tensor:
        """Mean predicted variance of each sample."""
        return (2 * logstd).exp().flatten(1).mean(dim=1)
