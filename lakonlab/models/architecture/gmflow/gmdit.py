"""DiT students that answer with a Gaussian mixture per pixel.

``B`` batch, ``K`` components, ``C`` channels, ``H W`` image size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lakonlab.models.architecture.diffusers.dit import ROW_ORDER, DiTBackbone
from lakonlab.models.architecture.gmflow.gm_output import GMOutput2D
from lakonlab.models.architecture.heads import (
    TEACHER_BIAS_NOISE,
    MixtureHead,
    fold_tokens,
    repeat_rows,
    require_positive,
    spread_noise,
)
from lakonlab.models.architecture.network import at_least
from lakonlab.ops.random_source import RandomSource, TorchSource
from lakonlab.registry import MODULES


@MODULES.register_module()
class GMDiTTransformer2DModelV2(DiTBackbone):
    """DiT with separate heads for means, weights and standard deviation, used by pi-Flow.

    Args:
        num_gaussians: ``K``.
        constant_logstd: Fixed log standard deviation; None to predict it.
        logstd_inner_dim: Hidden width of the layers for the standard deviation.
        gm_num_logstd_layers: Number of these layers.
        **backbone: See :class:`~lakonlab.models.architecture.diffusers.dit.DiTBackbone`.
    """

    output_modules = ('proj_out_1', 'proj_out_means', 'proj_out_logweights', 'proj_out_logstds')

    def __init__(
        self,
        num_gaussians: int = 16,
        constant_logstd: float | None = None,
        logstd_inner_dim: int = 1024,
        gm_num_logstd_layers: int = 2,
        **backbone,
    ):
        super().__init__(**backbone)
        require_positive(num_gaussians=num_gaussians, gm_num_logstd_layers=gm_num_logstd_layers)
        self.head = MixtureHead(num_gaussians, self.out_channels, self.patch_size, ROW_ORDER, constant_logstd)
        layers = self.head.layers(self.width, self.width, logstd_inner_dim, gm_num_logstd_layers)
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.prepare()

    def init_output_layers(self) -> None:
        """Start from distinct constant means, equal weights and a constant standard deviation."""
        self.head.init(self)

    def remap_pretrained(self, state: dict[str, Tensor], source: RandomSource | None = None) -> dict[str, Tensor]:
        """See the base class; a teacher's output layer becomes the means of all components."""
        state = super().remap_pretrained(state, source)
        return self.head.from_output_layer(state, self.state_dict(), 'proj_out_2', source)

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor, source: RandomSource | None = None
    ) -> dict[str, Tensor]:
        """Predict a mixture of velocities per pixel.

        Args:
            hidden_states: Shape ``(B, C, H, W)``.
            timestep: Shape ``(B,)``, in the unit the network is trained with.
            class_labels: Integers in ``[0, num_embeds_ada_norm]``, shape ``(B,)``; the largest is the null class.
            source: Random source of ``class_dropout`` and ``network_dropout``; None for torch's global state.

        Returns:
            ``means (B, K, C, H, W)``, ``logweights (B, K, 1, H, W)``, ``logstds (B, 1, 1, 1, 1)``.
        """
        with self.autocast(hidden_states.device):
            tokens, condition, grid = self.encode(hidden_states, timestep, class_labels, source)
            mixture = self.head(self, tokens, condition, grid)
        return {name: at_least(tensor, hidden_states.dtype) for name, tensor in mixture.items()}


@MODULES.register_module()
class GMDiTTransformer2DModel(DiTBackbone):
    """DiT with one output layer for means and weights, used by GMFlow (version 1).

    Rows of ``proj_out_2`` are ordered (patch row, patch column, output); the outputs are K * C means, then K logits.

    Args:
        num_gaussians: ``K``.
        constant_logstd: Fixed log standard deviation; None to predict it.
        logstd_inner_dim: Hidden width of the layers for the standard deviation.
        gm_num_logstd_layers: Number of these layers.
        **backbone: See :class:`~lakonlab.models.architecture.diffusers.dit.DiTBackbone`.
    """

    output_modules = ('proj_out_1', 'proj_out_2', 'gm_out')

    def __init__(
        self,
        num_gaussians: int = 16,
        constant_logstd: float | None = None,
        logstd_inner_dim: int = 1024,
        gm_num_logstd_layers: int = 2,
        **backbone,
    ):
        super().__init__(**backbone)
        require_positive(num_gaussians=num_gaussians, gm_num_logstd_layers=gm_num_logstd_layers)
        outputs = num_gaussians * (self.out_channels + 1)
        self.num_gaussians = num_gaussians
        self.proj_out_2 = nn.Linear(self.width, self.patch_size * self.patch_size * outputs)
        self.gm_out = GMOutput2D(
            num_gaussians, self.out_channels, self.width, constant_logstd, logstd_inner_dim, gm_num_logstd_layers
        )
        self.prepare()

    @torch.no_grad()
    def init_output_layers(self) -> None:
        """Start from distinct constant means, equal weights and a constant standard deviation."""
        nn.init.zeros_(self.proj_out_2.weight)
        noise = TorchSource().normal('head_bias', (self.num_gaussians * self.out_channels,))
        self.proj_out_2.bias.copy_(self._bias(self.gm_out.scratch_bias(noise)))
        self.gm_out.init_weights()

    def remap_pretrained(self, state: dict[str, Tensor], source: RandomSource | None = None) -> dict[str, Tensor]:
        """See the base class; a teacher's output layer becomes the means of all components."""
        state = super().remap_pretrained(state, source)
        K, C, area = self.num_gaussians, self.out_channels, self.patch_size * self.patch_size
        if 'proj_out_2.weight' not in state or state['proj_out_2.weight'].shape[0] != area * C:
            return state
        weight = repeat_rows(state['proj_out_2.weight'], K, self.patch_size, ROW_ORDER).reshape(area, K * C, -1)
        logits = weight.new_zeros(area, K, weight.shape[-1])
        state['proj_out_2.weight'] = torch.cat([weight, logits], dim=1).flatten(0, 1)
        bias = repeat_rows(state['proj_out_2.bias'], K, self.patch_size, ROW_ORDER)
        noise = (source or TorchSource()).normal('head_bias', (K * C,))
        bias = (bias + TEACHER_BIAS_NOISE * spread_noise(noise, self.patch_size, ROW_ORDER).to(bias)).reshape(
            area, K * C
        )
        state['proj_out_2.bias'] = torch.cat([bias, bias.new_zeros(area, K)], dim=1).flatten()
        state.update({name: tensor for name, tensor in self.state_dict().items() if name.startswith('gm_out.')})
        return state

    def _bias(self, outputs: Tensor) -> Tensor:
        return spread_noise(outputs, self.patch_size, ROW_ORDER).to(self.proj_out_2.bias)

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor, source: RandomSource | None = None
    ) -> dict[str, Tensor]:
        """Predict a mixture per pixel; see :meth:`GMDiTTransformer2DModelV2.forward`."""
        with self.autocast(hidden_states.device):
            tokens, condition, grid = self.encode(hidden_states, timestep, class_labels, source)
            rows = self.proj_out_2(tokens.to(self.proj_out_2.weight.dtype))
            mixture = self.gm_out(fold_tokens(rows, grid, self.patch_size, 1, ROW_ORDER).squeeze(1), condition)
        return {name: at_least(tensor, hidden_states.dtype) for name, tensor in mixture.items()}
