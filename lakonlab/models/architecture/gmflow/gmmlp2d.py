"""A small network for two-dimensional points, answering with a Gaussian mixture (GMFlow's toy experiments).

``B`` batch, ``K`` components.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor, nn

from lakonlab.models.architecture.embeddings import TableCache, cos_sin, time_frequencies
from lakonlab.models.architecture.heads import INITIAL_STD, SCRATCH_BIAS_NOISE, require_positive
from lakonlab.models.architecture.network import Network, at_least
from lakonlab.ops.random_source import TorchSource
from lakonlab.registry import MODULES

NUM_COORDINATES = 2
SHORTEST_PERIOD, LONGEST_PERIOD = 5e-3, 50.0


@MODULES.register_module()
class GMFlowMLP2DDenoiser(Network):
    """MLP on sinusoidal embeddings of the time and of both coordinates.

    Args:
        num_gaussians: ``K``.
        embed_dim: Width of the embedding of the time and of that of the point; a multiple of 4.
        hidden_dim: Width of the hidden layers.
        num_layers: Number of hidden layers.
        constant_logstd: Fixed log standard deviation; None to predict it.
        **network_options: See :class:`~lakonlab.models.architecture.network.Network`.
    """

    output_modules = ('out_means', 'out_logweights', 'out_logstds')

    def __init__(
        self,
        num_gaussians: int = 32,
        embed_dim: int = 256,
        hidden_dim: int = 512,
        num_layers: int = 5,
        constant_logstd: float | None = None,
        **network_options,
    ):
        super().__init__(**network_options)
        require_positive(num_gaussians=num_gaussians, embed_dim=embed_dim, hidden_dim=hidden_dim, num_layers=num_layers)
        if embed_dim % (2 * NUM_COORDINATES):
            raise ValueError(f'embed_dim={embed_dim}: expected a multiple of 4')
        self.num_gaussians = num_gaussians
        self.embed_dim = embed_dim
        self.constant_logstd = constant_logstd
        layers: list[nn.Module] = []
        width = 2 * embed_dim
        for _ in range(num_layers):
            layers += [nn.Linear(width, hidden_dim), nn.SiLU()]
            width = hidden_dim
        self.net = nn.Sequential(*layers)
        self.out_means = nn.Linear(hidden_dim, num_gaussians * NUM_COORDINATES)
        self.out_logweights = nn.Linear(hidden_dim, num_gaussians)
        self.out_logstds = nn.Linear(hidden_dim, 1) if constant_logstd is None else None
        self.time_frequencies = TableCache(partial(time_frequencies, embed_dim, frequency_shift=1.0))
        self.point_frequencies = TableCache(partial(point_frequencies, embed_dim))
        self.prepare()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Hidden layers Xavier uniform; distinct constant means, equal weights, a constant standard deviation."""
        for layer in self.net:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        for layer in (self.out_means, self.out_logweights, self.out_logstds):
            if layer is not None:
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)
        bias = self.out_means.bias
        bias.copy_(SCRATCH_BIAS_NOISE * TorchSource().normal('head_bias', (bias.numel(),)))
        if self.out_logstds is not None:
            nn.init.constant_(self.out_logstds.bias, math.log(INITIAL_STD))

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> dict[str, Tensor]:
        """Predict a mixture.

        Args:
            hidden_states: Points, shape ``(B, 2, 1, 1)``.
            timestep: Shape ``(B,)``, in the unit the network is trained with.

        Returns:
            ``means (B, K, 2, 1, 1)``, ``logweights (B, K, 1, 1, 1)``, ``logstds (B, 1, 1, 1, 1)``.
        """
        batch, device = hidden_states.shape[0], hidden_states.device
        time = cos_sin(timestep.float()[:, None] * self.time_frequencies.get(device))
        angles = hidden_states.reshape(batch, NUM_COORDINATES, 1).float() * self.point_frequencies.get(device)
        point = torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)
        with self.autocast(device):
            features = self.net(torch.cat([time, point], dim=1).to(self.net[0].weight.dtype))
            means = self.out_means(features).reshape(batch, self.num_gaussians, NUM_COORDINATES, 1, 1)
            logweights = F.log_softmax(self.out_logweights(features).float(), dim=1)
            if self.constant_logstd is None:
                logstds = self.out_logstds(features).reshape(batch, 1, 1, 1, 1)
            else:
                logstds = torch.full((batch, 1, 1, 1, 1), self.constant_logstd, device=device)
        mixture = {'means': means, 'logweights': logweights[:, :, None, None, None], 'logstds': logstds}
        return {name: at_least(tensor, hidden_states.dtype) for name, tensor in mixture.items()}


def point_frequencies(embed_dim: int) -> Tensor:
    """Angular frequencies for a coordinate, geometric between both periods, shape ``(embed_dim / 4,)``."""
    exponents = torch.linspace(0, 1, embed_dim // (2 * NUM_COORDINATES), dtype=torch.float64)
    return (2 * math.pi / (SHORTEST_PERIOD * (LONGEST_PERIOD / SHORTEST_PERIOD) ** exponents)).float()
