"""Brightness, contrast and saturation of images."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lakonlab.evaluation.entries import prefixed
from lakonlab.evaluation.estimate import Estimate
from lakonlab.evaluation.metrics import Metric
from lakonlab.evaluation.preparation import as_rgb
from lakonlab.evaluation.samples import SampleBatch
from lakonlab.registry import METRICS

LUMINANCE = (0.2126, 0.7152, 0.0722)
"""Weights of linear red, green and blue in luminance (ITU-R BT.709)."""


@METRICS.register_module()
class ColorStats(Metric):
    """Means over the samples of each image's brightness, contrast and saturation.

    Brightness is the mean of luminance as sRGB encodes it, contrast its standard deviation within an image, saturation
    that of hue, saturation and value. None of them tells better weights from worse ones.

    Args:
        prefix: Goes before the names of the numbers, with a ``_``.
    """

    def __init__(self, prefix: str = ''):
        self.prefix = prefix
        super().__init__()

    def reset(self) -> None:
        self._values: dict[str, list[float]] = {name: [] for name in ('brightness', 'contrast', 'saturation')}

    def feed(self, batch: SampleBatch) -> None:
        for name, values in color_stats(as_rgb(batch.images)).items():
            self._values[name] += values.tolist()

    def compute(self) -> dict[str, float]:
        numbers = {}
        for name, values in self._values.items():
            name = prefixed(self.prefix, name)
            numbers[name], numbers[f'{name}_std'] = Estimate.of(values)
        return numbers

    def protocol(self) -> dict[str, Any]:
        return dict(num_images=len(self._values['brightness']))


def color_stats(images: Tensor) -> dict[str, Tensor]:
    """Statistics of each image.

    Args:
        images: Shape (B, 3, H, W), float in [0, 1], sRGB.

    Returns:
        ``brightness``, ``contrast`` and ``saturation``, each of shape (B,), float64, in [0, 1].
    """
    images = images.double().clamp(0, 1)
    weights = images.new_tensor(LUMINANCE).reshape(3, 1, 1)
    encoded = _encoded((_linear(images) * weights).sum(dim=1)).flatten(1)
    highest, lowest = images.amax(dim=1), images.amin(dim=1)
    saturation = (highest - lowest) / highest.clamp(min=1e-12)
    return dict(
        brightness=encoded.mean(dim=1),
        contrast=encoded.std(dim=1, correction=0),
        saturation=saturation.flatten(1).mean(dim=1),
    )


def _linear(encoded: Tensor) -> Tensor:
    """Light of values that sRGB encodes (IEC 61966-2-1)."""
    return (encoded / 12.92).where(encoded <= 0.04045, ((encoded + 0.055) / 1.055) ** 2.4)


def _encoded(linear: Tensor) -> Tensor:
    """Values by which sRGB encodes light."""
    return (linear * 12.92).where(linear <= 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055)
