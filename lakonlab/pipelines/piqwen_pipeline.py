"""Qwen-Image in a few steps."""

from __future__ import annotations

from diffusers import QwenImagePipeline

from lakonlab.pipelines.piflow_mixin import PiFlowPipelineMixin


class PiQwenImagePipeline(PiFlowPipelineMixin, QwenImagePipeline):
    """Qwen-Image with an adapter of pi-Flow; see :class:`PiFlowPipelineMixin`."""

    unguided = {'true_cfg_scale': 1.0}


__all__ = ['PiQwenImagePipeline']
