"""Measuring what a model generates: feature extractors, metrics, and the hook that runs them while training."""
