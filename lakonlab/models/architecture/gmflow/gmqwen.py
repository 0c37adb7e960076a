"""Qwen-Image student of the GMFlow policy."""

from __future__ import annotations

from lakonlab.models.architecture.diffusers.qwen_image import QwenImageTransformer2DModel
from lakonlab.models.architecture.diffusers.students import MixtureStudent
from lakonlab.registry import MODULES


@MODULES.register_module()
class GMQwenImageTransformer2DModel(MixtureStudent, QwenImageTransformer2DModel):
    """Qwen-Image that answers with a Gaussian mixture per pixel; see both bases for the arguments."""
