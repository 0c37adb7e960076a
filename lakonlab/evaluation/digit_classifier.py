"""A small classifier of 8x8 digits, whose features before the last layer measure how real generated digits look.

``tools/train_digit_classifier.py`` trains it; its weights and figures ship in ``lakonlab/evaluation/weights/``. It
never saw the held-out digits. A fixed scale makes the variance of a feature one on average over the training digits, so
that distances do not depend on the scale that training happened to choose.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn

from lakonlab.evaluation.extractor import FeatureExtractor, Features
from lakonlab.registry import FEATURE_EXTRACTORS
from lakonlab.storage.fetch import fetch

SHIPPED_WEIGHTS = Path(__file__).parent / 'weights' / 'digit_classifier.safetensors'


class DigitClassifierNet(nn.Module):
    """Four convolutions, an average over the image, a linear classifier.

    The averages say which strokes there are, so they also tell sharp from blurred digits; features of a fully connected
    layer were found to know the class and little else.

    Args:
        width: Channels of the first convolution; the next two have twice as many.
        feature_dim: Channels of the last convolution, and dimension of the features.
        num_classes: Number of classes.
    """

    def __init__(self, width: int = 16, feature_dim: int = 64, num_classes: int = 10):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(2 * width, feature_dim, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.head = nn.Linear(feature_dim, num_classes)
        self.register_buffer('feature_scale', torch.ones(()))

    def forward(self, pixels: Tensor) -> Features:
        """Classify digits.

        Args:
            pixels: Shape (B, 1, 8, 8), in [-1, 1].

        Returns:
            Scaled features, shape (B, feature_dim), and logits, shape (B, num_classes).
        """
        features = self.body(pixels)
        return Features(features * self.feature_scale, self.head(features))


@FEATURE_EXTRACTORS.register_module()
class DigitClassifier(FeatureExtractor):
    """Features and class scores of 8x8 digits.

    Args:
        weights: A safetensors file made by ``tools/train_digit_classifier.py``, local or a URL; None for the one that
            ships.

    Raises:
        OSError: There is no such file, or it cannot be downloaded.
        ValueError: The file holds the weights of another network.
    """

    input_size = 8
    classifies = True

    def __init__(self, weights: str | None = None):
        super().__init__()
        from safetensors.torch import load

        path = SHIPPED_WEIGHTS if weights is None else fetch(weights)
        if not path.is_file():
            raise FileNotFoundError(f'DigitClassifier.weights: there is no file {path}')
        content = path.read_bytes()
        state = load(content)
        try:
            num_classes, feature_dim = state['head.weight'].shape
            self.net = DigitClassifierNet(len(state['body.0.weight']), feature_dim, num_classes)
            self.net.load_state_dict(state)
        except (KeyError, RuntimeError) as error:
            raise ValueError(f'DigitClassifier.weights: {path} does not hold a digit classifier: {error}') from None
        self.feature_dim = feature_dim
        self.weights_hash = hashlib.sha256(content).hexdigest()

    def forward(self, images: Tensor) -> Features:
        if images.shape[1:] != (1, 8, 8):
            raise ValueError(f'DigitClassifier needs images of shape (B, 1, 8, 8), got {tuple(images.shape)}')
        return self.net(images * 2 - 1)

    def protocol(self) -> dict[str, str]:
        return dict(name='DigitClassifier', weights_sha256=self.weights_hash, images='8x8, float, not resized')
