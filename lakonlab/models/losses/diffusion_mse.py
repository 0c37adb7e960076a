"""Mean squared error of a velocity."""

from __future__ import annotations

from torch import Tensor

from lakonlab.models.losses.base import DiffusionLoss
from lakonlab.registry import MODULES


@MODULES.register_module()
class DiffusionMSELoss(DiffusionLoss):
    """``0.5 * mean((pred - target)^2)``. See :class:`DiffusionLoss` for the arguments."""

    default_data_info = {'pred': 'u_t_pred', 'target': 'u_t'}

    def __init__(self, data_info=None, rescale_mode=None, rescale_cfg=None, log_cfgs=None, loss_name='loss_mse'):
        super().__init__(data_info, rescale_mode, rescale_cfg, log_cfgs, loss_name)

    def per_sample(self, pred: Tensor, target: Tensor) -> Tensor:
        """Loss of each sample for tensors (B, C, *)."""
        return 0.5 * (pred - target).square().flatten(1).mean(dim=1)
