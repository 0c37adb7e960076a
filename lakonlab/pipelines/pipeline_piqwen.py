"""Newer name of :mod:`lakonlab.pipelines.piqwen_pipeline`."""

from lakonlab.pipelines.piqwen_pipeline import PiQwenImagePipeline

__all__ = ['PiQwenImagePipeline']
