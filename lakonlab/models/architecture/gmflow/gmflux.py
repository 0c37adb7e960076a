"""FLUX.1 student of the GMFlow policy."""

from __future__ import annotations

from lakonlab.models.architecture.diffusers.flux import FluxTransformer2DModel
from lakonlab.models.architecture.diffusers.students import MixtureStudent
from lakonlab.registry import MODULES


@MODULES.register_module()
class GMFluxTransformer2DModel(MixtureStudent, FluxTransformer2DModel):
    """FLUX.1 that answers with a Gaussian mixture per pixel; see both bases for the arguments."""
