"""FLUX.2 in a few steps."""

from __future__ import annotations

from diffusers import Flux2Pipeline

from lakonlab.pipelines.piflow_mixin import PiFlowPipelineMixin


class PiFlux2Pipeline(PiFlowPipelineMixin, Flux2Pipeline):
    """FLUX.2 with an adapter of pi-Flow, also for editing (``image``); see :class:`PiFlowPipelineMixin`."""


__all__ = ['PiFlux2Pipeline']
