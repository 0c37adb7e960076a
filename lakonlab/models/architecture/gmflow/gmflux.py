"""FLUX.1 students of the GMFlow policy."""

from __future__ import annotations

from lakonlab.models.architecture.diffusers.flux import FluxTransformer2DModel
from lakonlab.registry import MODULES


@MODULES.register_module()
class GMFluxTransformer2DModel(FluxTransformer2DModel):
    """FLUX.1 that answers with a Gaussian mixture per pixel.

    Args:
        num_gaussians: Number of components ``K``.
        constant_logstd: Fixed log standard deviation; None to predict it.
        logstd_inner_dim: Hidden width of the layers for the standard deviation.
        gm_num_logstd_layers: Number of these layers.
        logweights_channels: Weights per token and component; None for the only choice, one per pixel.
        **options: See :class:`~lakonlab.models.architecture.diffusers.flux.FluxTransformer2DModel`.
    """

    def __init__(
        self,
        num_gaussians: int = 16,
        constant_logstd: float | None = None,
        logstd_inner_dim: int = 1024,
        gm_num_logstd_layers: int = 2,
        logweights_channels: int | None = None,
        **options,
    ):
        head = {
            'type': 'GMFlow',
            'num_gaussians': num_gaussians,
            'constant_logstd': constant_logstd,
            'logstd_inner_dim': logstd_inner_dim,
            'gm_num_logstd_layers': gm_num_logstd_layers,
            'logweights_channels': logweights_channels,
        }
        super().__init__(head=head, **options)
