"""Bringing images to the size that a feature extractor looks at."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

QUANTISATIONS = ('float', 'uint8')


@dataclass(frozen=True)
class Preparation:
    """How images are brought to a size; equal ones share features.

    Args:
        size: Side in pixels; None leaves images as they are, for extractors that resize themselves.
        center_crop: Cut the middle out of images that are at least as large, instead of resizing them.
        mode: ``'bicubic'``, antialiased and clipped to [0, 1], or ``'bilinear'``, not antialiased.
    """

    size: int | None = None
    center_crop: bool = False
    mode: str = 'bicubic'

    def __post_init__(self):
        if self.mode not in ('bicubic', 'bilinear'):
            raise ValueError(f"resize_mode={self.mode!r}: expected 'bicubic' or 'bilinear'")
        if self.center_crop and self.size is None:
            raise ValueError('center_crop=True needs a size, and this extractor has none')

    def __call__(self, images: Tensor) -> Tensor:
        """Prepare images.

        Args:
            images: Shape (B, C, H, W), float in [0, 1].

        Returns:
            Shape (B, C, size, size), float in [0, 1].

        Raises:
            ValueError: They are smaller than the crop.
        """
        height, width = images.shape[-2:]
        if self.size is None or (height, width) == (self.size, self.size):
            return images
        if self.center_crop:
            if min(height, width) < self.size:
                raise ValueError(
                    f'center_crop=True cuts {self.size} x {self.size} pixels out of images of {height} x {width}; '
                    'resize them instead'
                )
            top, left = (height - self.size) // 2, (width - self.size) // 2
            return images[..., top : top + self.size, left : left + self.size]
        size = (self.size, self.size)
        # in [-1, 1], where bicubic resizing rounds as in published numbers
        signed = images.float() * 2 - 1
        resized = F.interpolate(signed, size, mode=self.mode, align_corners=False, antialias=self.mode == 'bicubic')
        return resized.clamp(-1, 1) / 2 + 0.5

    def protocol(self) -> dict[str, Any]:
        """The arguments as plain data."""
        return asdict(self)


AS_THEY_ARE = Preparation()


def quantised(images: Tensor, quantize: str) -> Tensor:
    """Images as metrics get to see them.

    Args:
        images: Float in [0, 1].
        quantize: ``'float'`` for the images as they are, ``'uint8'`` for what a file with 8 bits per channel keeps.

    Returns:
        The same shape, float; of ``'uint8'``, multiples of 1/255.
    """
    if quantize not in QUANTISATIONS:
        raise ValueError(f'quantize={quantize!r}: expected one of {", ".join(map(repr, QUANTISATIONS))}')
    return images if quantize == 'float' else (images.float().clamp(0, 1) * 255).round() / 255


def as_rgb(images: Tensor) -> Tensor:
    """Images (B, 1 or 3, H, W) with three channels."""
    if images.dim() != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f'expected images of shape (B, 1 or 3, H, W), got {tuple(images.shape)}')
    return images.expand(-1, 3, -1, -1)


def to_bytes(images: Tensor) -> Tensor:
    """Images in [0, 1] as uint8, ``floor(255 x + 1/2)``, which is what published features were computed of."""
    return (images.float() * 255 + 0.5).floor().clamp(0, 255).to(torch.uint8)
