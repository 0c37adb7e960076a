"""Qwen-Image students of the DX policy."""

from __future__ import annotations

from lakonlab.models.architecture.diffusers.qwen_image import QwenImageTransformer2DModel
from lakonlab.registry import MODULES


@MODULES.register_module()
class DXQwenImageTransformer2DModel(QwenImageTransformer2DModel):
    """Qwen-Image that predicts N velocities, at the points of a time grid or as coefficients of a polynomial in time.

    Args:
        n_grid: ``N`` points of a grid.
        p_order: ``N`` coefficients of a polynomial; give this or ``n_grid``.
        **options: See :class:`~lakonlab.models.architecture.diffusers.qwen_image.QwenImageTransformer2DModel`.
    """

    def __init__(self, n_grid: int | None = None, p_order: int | None = None, **options):
        super().__init__(head={'type': 'DX', 'n_grid': n_grid, 'p_order': p_order}, **options)
