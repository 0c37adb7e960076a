"""FLUX.1 in a few steps."""

from __future__ import annotations

from diffusers import FluxPipeline

from lakonlab.pipelines.piflow_mixin import PiFlowPipelineMixin


class PiFluxPipeline(PiFlowPipelineMixin, FluxPipeline):
    """FLUX.1-dev with an adapter of pi-Flow; see :class:`PiFlowPipelineMixin`.

    ``guidance_scale`` is the scale that FLUX.1-dev embeds; by default that of the adapter's recipe, or 3.5.
    """

    unguided = {'true_cfg_scale': 1.0}


__all__ = ['PiFluxPipeline']
