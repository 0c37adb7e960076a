"""Reading images, and bringing them to a size."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lakonlab.storage import files

if TYPE_CHECKING:
    from PIL import Image

RESAMPLING = ('bicubic', 'lanczos')
"""Filters by which images are resized."""


def read_rgb(path: str | Path) -> Image.Image:
    """Read an image; grey, palette, CMYK and transparent ones become RGB. Transparency is dropped, not blended.

    Args:
        path: The file, local or a URL.

    Raises:
        ValueError: It is no image, or a damaged one.
    """
    from PIL import Image, UnidentifiedImageError

    content = files.read_bytes(path)
    try:
        with Image.open(io.BytesIO(content)) as file:
            return file.convert('RGBA').convert('RGB') if file.mode == 'P' else file.convert('RGB')
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f'{path}: {len(content)} bytes are no whole image: {error}') from error


def as_tensor(image: Image.Image) -> Tensor:
    """An RGB image as (3, H, W), float32 in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def adm_square(image: Image.Image, size: int) -> Image.Image:
    """Bring an image to a square, as ADM does (Dhariwal & Nichol, 2021).

    Halved by box averages while the shorter side is at least twice ``size``, resized bicubically to a shorter side of
    ``size``, and cropped around the centre.

    Args:
        image: Any image.
        size: Side of the square in pixels.
    """
    from PIL import Image

    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    return centre_crop(image, size, size)


def cover(image: Image.Image, height: int, width: int, method: str = 'bicubic') -> Image.Image:
    """Resize an image so that it just covers a rectangle, and crop what stands out on both sides.

    Args:
        image: Any image; one that has the size already comes back as it is.
        height: Height of the rectangle in pixels.
        width: Its width.
        method: One of :data:`RESAMPLING`.
    """
    from PIL import Image

    scale = max(height / image.height, width / image.width)
    size = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    if size != image.size:
        image = image.resize(size, Image.Resampling[method.upper()])
    return centre_crop(image, height, width)


def centre_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    """The middle of an image that is at least as large; an odd pixel is taken from the right or the bottom."""
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
