"""FLUX.1 student of the DX policy."""

from __future__ import annotations

from lakonlab.models.architecture.diffusers.flux import FluxTransformer2DModel
from lakonlab.models.architecture.diffusers.students import GridStudent
from lakonlab.registry import MODULES


@MODULES.register_module()
class DXFluxTransformer2DModel(GridStudent, FluxTransformer2DModel):
    """FLUX.1 that predicts velocities at several times; see both bases for the arguments."""
