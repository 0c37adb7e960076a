"""What a feature extractor is: a frozen network that turns images into vectors and says which network it is."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

from mmengine.registry import Registry
from torch import Tensor, nn

from lakonlab.registry import FEATURE_EXTRACTORS


class Features(NamedTuple):
    """What an extractor sees in a batch of images.

    Args:
        embedding: Shape (B, D), float32.
        logits: Class scores, shape (B, number of classes), for extractors that classify; else None.
    """

    embedding: Tensor
    logits: Tensor | None = None


class FeatureExtractor(nn.Module, ABC):
    """Base class; a new extractor implements :meth:`forward` and :meth:`protocol` and registers itself.

    Attributes:
        input_size: Side in pixels that metrics bring images to; None if images are taken as they are.
        feature_dim: Dimension of the features; None if it shows only in what comes out.
        classifies: Whether there are class scores; None if it shows only in what comes out.
    """

    input_size: int | None = None
    feature_dim: int | None = None
    classifies: bool | None = None

    @abstractmethod
    def forward(self, images: Tensor) -> Features:
        """Extract features.

        Args:
            images: Shape (B, C, H, W), float in [0, 1].

        Returns:
            Features of each image.
        """

    @abstractmethod
    def protocol(self) -> dict[str, str]:
        """What must be equal for two features to be comparable.

        Returns:
            Name of the extractor, hash of its weights, and how images are prepared, as plain data.
        """


class ExtractorPool:
    """Builds extractors, each of them once, so that metrics share the network and its outputs."""

    def __init__(self):
        self._extractors: dict[str, nn.Module] = {}

    def build(self, config: Mapping, registry: Registry = FEATURE_EXTRACTORS) -> Any:
        """Return the extractor of a config, or another network of a metric.

        Args:
            config: ``type``, a name in the registry, and the arguments of that class.
            registry: Where the name is registered.

        Returns:
            A frozen network in evaluation mode; the same object for an equal config.
        """
        key = f'{registry.name}: {json.dumps(config, sort_keys=True, default=str)}'
        if key not in self._extractors:
            self._extractors[key] = registry.build(dict(config)).eval().requires_grad_(False)
        return self._extractors[key]

    def offload(self) -> None:
        """Move all extractors to the CPU; they go back where images are when they are needed."""
        for extractor in self._extractors.values():
            extractor.cpu()
