"""Newer name of :mod:`lakonlab.pipelines.piflux_pipeline`."""

from lakonlab.pipelines.piflux_pipeline import PiFluxPipeline

__all__ = ['PiFluxPipeline']
