"""Predicts the power spectrum of a mixture's latent noise from two statistics (GMFlow's spectral sampling)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lakonlab.models.architecture.network import Network
from lakonlab.registry import MODULES


@MODULES.register_module()
class SpectrumMLP(Network):
    """MLP from the variance of a Gaussian and the spatial variance of its mean to a log power spectrum.

    Args:
        base_size: Channels, height and width ``(C, H, W)`` of the spectrum it holds.
        layers: Widths of the hidden layers.
        **network_options: See :class:`~lakonlab.models.architecture.network.Network`.
    """

    output_modules = ('mlp',)

    def __init__(self, base_size: Sequence[int] = (4, 32, 32), layers: Sequence[int] = (64, 8), **network_options):
        super().__init__(**network_options)
        if len(base_size) != 3 or min(base_size) < 1:
            raise ValueError(f'base_size={base_size!r}: expected (channels, height, width)')
        self.base_size = tuple(base_size)
        stages: list[nn.Module] = []
        width = 2
        for features in layers:
            stages += [nn.Linear(width, features), nn.SiLU()]
            width = features
        self.mlp = nn.Sequential(*stages, nn.Linear(width, math.prod(self.base_size)))
        self.prepare()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Hidden layers Xavier uniform; a white spectrum."""
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.mlp[-1].weight)

    def forward(self, mean: Tensor, var: Tensor) -> Tensor:
        """Predict the logarithm of the power of every frequency.

        Args:
            mean: Mean of the Gaussian, shape ``(B, C, H, W)``.
            var: Its variance, shape ``(B, 1, H, W)``.

        Returns:
            Shape ``(B, C, H, W)``, in the order of an FFT; the power of a channel averages to one.

        Raises:
            ValueError: The image is larger than ``base_size``, or has other channels.
        """
        channels, base_height, base_width = self.base_size
        height, width = mean.shape[-2:]
        if mean.shape[1] != channels or height > base_height or width > base_width:
            raise ValueError(f'mean has shape {tuple(mean.shape)}, but base_size={self.base_size} bounds its size')
        statistics = torch.stack([var.flatten(1).mean(dim=1), mean.flatten(2).var(dim=2).mean(dim=1)], dim=1)
        with self.autocast(mean.device):
            spectrum = self.mlp(statistics.to(self.mlp[0].weight.dtype))
        spectrum = spectrum.unflatten(1, self.base_size)
        # low frequencies are at both ends of an FFT's axes
        spectrum = _keep_ends(_keep_ends(spectrum, 2, height), 3, width)
        flat = spectrum.flatten(2).to(mean.dtype)
        return (flat.log_softmax(dim=-1) + math.log(height * width)).reshape(mean.shape)


def _keep_ends(spectrum: Tensor, axis: int, size: int) -> Tensor:
    if spectrum.shape[axis] == size:
        return spectrum
    first = spectrum.narrow(axis, 0, (size + 1) // 2)
    return torch.cat([first, spectrum.narrow(axis, spectrum.shape[axis] - size // 2, size // 2)], dim=axis)
