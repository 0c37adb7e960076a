"""Negative log-likelihood under a Gaussian mixture per pixel (Chen et al., "Gaussian Mixture Flow Matching Models")."""

from __future__ import annotations

import math

from torch import Tensor

from lakonlab.models.losses.base import RunningQuartileLoss
from lakonlab.registry import MODULES


@MODULES.register_module()
class GMFlowNLLLoss(RunningQuartileLoss):
    """``-log sum_k pi_k N(target; mean_k, std^2)`` per pixel, divided by the number of channels.

    See :class:`DiffusionLoss` for the arguments.
    """

    default_data_info = {
        'pred_means': 'means',
        'target': 'x_t_low',
        'pred_logstds': 'logstds',
        'pred_logweights': 'logweights',
    }

    def __init__(self, data_info=None, rescale_mode=None, rescale_cfg=None, log_cfgs=None, loss_name='loss_trans'):
        super().__init__(data_info, rescale_mode, rescale_cfg, log_cfgs, loss_name)

    def per_sample(self, pred_means: Tensor, target: Tensor, pred_logstds: Tensor, pred_logweights: Tensor) -> Tensor:
        """Loss of each sample.

        Args:
            pred_means: (B, K, C, H, W), or (B, T, K, C, H, W) for video.
            target: (B, C, H, W), or (B, T, C, H, W).
            pred_logstds: Broadcasts to the means.
            pred_logweights: Normalised log-weights, (B, [T,] K, 1, H, W).
        """
        scaled = (target.unsqueeze(-4) - pred_means) * (-pred_logstds).exp()
        gaussian = -0.5 * scaled.square() - pred_logstds - 0.5 * math.log(2 * math.pi)
        log_likelihood = (pred_logweights + gaussian.sum(dim=-3, keepdim=True)).logsumexp(dim=-4)
        return -log_likelihood.flatten(1).mean(dim=1) / pred_means.shape[-3]

    def variance_per_sample(
        self, pred_means: Tensor, target: Tensor, pred_logstds: Tensor, pred_logweights: Tensor
    ) -> Tensor:
        """Mean total variance of each sample: spread of the means, averaged over channels, plus the components' own."""
        weights = pred_logweights.exp()
        mean = (weights * pred_means).sum(dim=-4, keepdim=True)
        spread = (weights * (pred_means - mean).square()).sum(dim=-4, keepdim=True).mean(dim=-3, keepdim=True)
        return (spread + (2 * pred_logstds).exp()).flatten(1).mean(dim=1)
