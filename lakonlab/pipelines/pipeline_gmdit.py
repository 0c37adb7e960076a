"""Newer name of :mod:`lakonlab.pipelines.gmdit_pipeline`."""

from lakonlab.pipelines.gmdit_pipeline import GMDiTPipeline

__all__ = ['GMDiTPipeline']
