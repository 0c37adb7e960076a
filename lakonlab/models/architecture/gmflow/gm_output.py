"""Splits the channels of one output layer into the parameters of a mixture."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lakonlab.models.architecture.heads import (
    SCRATCH_BIAS_NOISE,
    init_logstd_layers,
    logstds_of,
    make_logstd_layers,
)


class GMOutput2D(nn.Module):
    """Output stage of the first GMFlow networks.

    Args:
        num_gaussians: ``K``.
        channels: ``C``.
        condition_features: Width of the conditioning embedding.
        constant_logstd: Fixed log standard deviation; None to predict it.
        logstd_inner_dim: Hidden width of the layers for the standard deviation.
        num_logstd_layers: Number of these layers.
    """

    def __init__(
        self,
        num_gaussians: int,
        channels: int,
        condition_features: int,
        constant_logstd: float | None,
        logstd_inner_dim: int,
        num_logstd_layers: int,
    ):
        super().__init__()
        self.num_gaussians = num_gaussians
        self.channels = channels
        self.constant_logstd = constant_logstd
        self.logstd_layers = None
        if constant_logstd is None:
            self.logstd_layers = make_logstd_layers(condition_features, logstd_inner_dim, num_logstd_layers)

    def init_weights(self) -> None:
        """Start from a constant standard deviation."""
        if self.logstd_layers is not None:
            init_logstd_layers(self.logstd_layers)

    def scratch_bias(self, noise: Tensor) -> Tensor:
        """Bias of the layer before this one for training from scratch: distinct means, equal weights.

        Args:
            noise: Standard normal, shape ``(K * C,)``.

        Returns:
            Shape ``(K * C + K,)``.
        """
        return torch.cat([SCRATCH_BIAS_NOISE * noise, noise.new_zeros(self.num_gaussians)])

    def forward(self, outputs: Tensor, condition: Tensor) -> dict[str, Tensor]:
        """Split ``(B, K * (C + 1), H, W)`` into means and weights, and add the standard deviation.

        Args:
            outputs: K * C means, then K logits.
            condition: Conditioning embedding, shape ``(B, D)``.

        Returns:
            ``means (B, K, C, H, W)``, ``logweights (B, K, 1, H, W)``, ``logstds (B, 1, 1, 1, 1)``.
        """
        K = self.num_gaussians
        means, logits = outputs.split([K * self.channels, K], dim=1)
        return {
            'means': means.unflatten(1, (K, self.channels)),
            'logweights': logits.float().log_softmax(dim=1).unsqueeze(2),
            'logstds': logstds_of(self.logstd_layers, self.constant_logstd, condition),
        }
