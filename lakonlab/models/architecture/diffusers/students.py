"""Arguments of published students, as heads of :mod:`lakonlab.models.architecture.packed_head`.

A published class name is one of these before the transformer that it is a student of.
"""

from __future__ import annotations


class MixtureStudent:
    """A transformer that answers with a Gaussian mixture per pixel.

    Args:
        num_gaussians: Number of components ``K``.
        constant_logstd: Fixed log standard deviation; None to predict it.
        logstd_inner_dim: Hidden width of the layers for the standard deviation.
        gm_num_logstd_layers: Number of these layers.
        logweights_channels: Weights per token and component; None for the only choice, one per pixel.
        **options: Of the transformer.
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


class GridStudent:
    """A transformer that predicts N velocities, at the points of a time grid or as coefficients of a polynomial.

    Args:
        n_grid: ``N`` points of a grid.
        p_order: ``N`` coefficients of a polynomial; give this or ``n_grid``.
        **options: Of the transformer.
    """

    def __init__(self, n_grid: int | None = None, p_order: int | None = None, **options):
        super().__init__(head={'type': 'DX', 'n_grid': n_grid, 'p_order': p_order}, **options)
