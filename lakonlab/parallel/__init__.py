"""Strategies: how a model is spread over processes and devices, and how its state is gathered for a checkpoint."""
