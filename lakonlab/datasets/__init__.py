"""Datasets, the order in which a run reads them, and loaders."""
