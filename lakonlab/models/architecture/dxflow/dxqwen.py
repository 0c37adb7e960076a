"""Qwen-Image student of the DX policy."""

from __future__ import annotations

from lakonlab.models.architecture.diffusers.qwen_image import QwenImageTransformer2DModel
from lakonlab.models.architecture.diffusers.students import GridStudent
from lakonlab.registry import MODULES


@MODULES.register_module()
class DXQwenImageTransformer2DModel(GridStudent, QwenImageTransformer2DModel):
    """Qwen-Image that predicts velocities at several times; see both bases for the arguments."""
