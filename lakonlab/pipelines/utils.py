"""Newer name of what is in :mod:`lakonlab.pipelines.piflow_loader`."""

from lakonlab.pipelines.piflow_loader import PiFlowLoaderMixin as LakonLabMixin

__all__ = ['LakonLabMixin']
