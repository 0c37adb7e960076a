"""A grid of samples with their captions, as one image for logs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

GREY = 96
LEAST, MOST = 64, 512
"""Pixels of the longer side of a cell: smaller images are enlarged by a whole factor, larger ones are shrunk."""
LONGEST = 2048
"""Pixels of the longer side of a grid, for which images are shrunk further."""
PADDING = 2
FONT_SIZE, LINE_HEIGHT, LINES = 10, 12, 3
ELLIPSIS = '...'


def shrunk(image: np.ndarray) -> np.ndarray:
    """An image as a grid can use it: of at most ``MOST`` pixels on its longer side.

    Args:
        image: Shape (H, W, 3), uint8.
    """
    return _resized(image, MOST / max(image.shape[:2]))


def fitted(images: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Images, shrunk by one factor so that a grid of them with captions has no side longer than ``LONGEST``.

    Args:
        images: Each of shape (H, W, 3), uint8; at least one.
    """
    columns = _columns(len(images))
    room = [(LONGEST - PADDING) // count - PADDING for count in (-(-len(images) // columns), columns)]
    room[0] -= LINES * LINE_HEIGHT
    factor = min(room[axis] / max(image.shape[axis] for image in images) for axis in (0, 1))
    return [_resized(image, factor) for image in images]


def _resized(image: np.ndarray, factor: float) -> np.ndarray:
    """An image, antialiased, with shorter sides; never with longer ones."""
    if factor >= 1:
        return image
    height, width, _ = image.shape
    size = max(1, int(width * factor)), max(1, int(height * factor))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))


def _columns(count: int) -> int:
    """Images per row of a square."""
    return math.ceil(math.sqrt(count))


def sample_grid(images: Sequence[np.ndarray], captions: Sequence[str]) -> np.ndarray:
    """Arrange images in a square, each above its caption.

    Args:
        images: Each of shape (H, W, 3), uint8; at least one. See :func:`shrunk` for large ones.
        captions: One for each; as much of it is drawn as fits into three lines.

    Returns:
        One image, shape (rows, columns, 3), uint8, no side longer than ``LONGEST``.
    """
    return make_grid(with_captions(enlarged(in_one_size(fitted(images))), captions))


def make_grid(pixels: np.ndarray, columns: int | None = None, padding: int = PADDING) -> np.ndarray:
    """Arrange images of one size in rows.

    Args:
        pixels: Shape (N, H, W, 3), uint8, N at least 1.
        columns: Images per row; None for a square.
        padding: Grey pixels between images.

    Returns:
        One image, shape (rows, columns, 3), uint8.
    """
    count, height, width, _ = pixels.shape
    columns = min(count, columns or _columns(count))
    rows = -(-count // columns)
    grid = np.full((rows * (height + padding) + padding, columns * (width + padding) + padding, 3), GREY, np.uint8)
    for index, image in enumerate(pixels):
        top = padding + index // columns * (height + padding)
        left = padding + index % columns * (width + padding)
        grid[top : top + height, left : left + width] = image
    return grid


def enlarged(pixels: np.ndarray) -> np.ndarray:
    """Images (N, H, W, 3), each pixel repeated so that the longer side comes close to ``LEAST``."""
    factor = max(1, LEAST // max(pixels.shape[1:3]))
    return pixels.repeat(factor, axis=1).repeat(factor, axis=2)


def in_one_size(images: Sequence[np.ndarray]) -> np.ndarray:
    """Images of several sizes in cells of the largest height and width, centred on grey.

    Args:
        images: Each of shape (H, W, 3), uint8; at least one.

    Returns:
        Shape (N, H, W, 3), uint8.
    """
    height, width = (max(image.shape[axis] for image in images) for axis in (0, 1))
    cells = np.full((len(images), height, width, 3), GREY, np.uint8)
    for cell, image in zip(cells, images):
        top, left = (height - image.shape[0]) // 2, (width - image.shape[1]) // 2
        cell[top : top + image.shape[0], left : left + image.shape[1]] = image
    return cells


def with_captions(cells: np.ndarray, captions: Sequence[str]) -> np.ndarray:
    """Cells with their captions below them.

    Args:
        cells: Shape (N, H, W, 3), uint8.
        captions: N texts.

    Returns:
        Shape (N, H + lines * 12, W, 3), as many lines as the longest of the captions needs, at most three.
    """
    font = ImageFont.load_default(FONT_SIZE)
    texts = [wrapped(caption, font, cells.shape[2]) for caption in captions]
    strip = max(len(lines) for lines in texts) * LINE_HEIGHT
    result = np.pad(cells, ((0, 0), (0, strip), (0, 0), (0, 0)))
    for cell, lines in zip(result, texts, strict=True):
        if lines:
            label = Image.new('RGB', (cells.shape[2], strip))
            draw = ImageDraw.Draw(label)
            for number, line in enumerate(lines):
                draw.text((1, number * LINE_HEIGHT), line, fill='white', font=font)
            cell[cells.shape[1] :] = np.asarray(label)
    return result


def wrapped(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> list[str]:
    """A text in at most three lines, with an ellipsis where it is longer.

    Args:
        text: Any text.
        font: What it is drawn with.
        width: Pixels of a line.
    """
    rest = ' '.join(text.encode(errors='replace').decode().split())
    lines: list[str] = []
    while rest and len(lines) < LINES:
        room = fitting(rest, font, width)
        if room < len(rest) and len(lines) == LINES - 1:
            room = max(1, fitting(rest, font, width - font.getlength(ELLIPSIS)))
            return [*lines, rest[:room].rstrip() + ELLIPSIS]
        if room < len(rest) and ' ' in rest[: room + 1]:
            room = rest[: room + 1].rindex(' ')
        lines.append(rest[:room].rstrip())
        rest = rest[room:].lstrip()
    return lines


def fitting(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: float) -> int:
    """How many characters of a text fit into a line; at least one."""
    count = 1
    while count < len(text) and font.getlength(text[: count + 1]) <= width:
        count += 1
    return count
