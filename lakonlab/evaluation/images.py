"""Sampled images as files: one PNG per sample, a grid to look at, and a page."""

from __future__ import annotations

import io
import json
import logging
import math
import re
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lakonlab.storage import files
from lakonlab.storage.remote_path import AnyPath, as_path

logger = logging.getLogger('lakonlab.evaluation')

GRID_FILE = 'grid.png'
ORIGIN_FILE = 'samples.json'
OWN_FILE = re.compile(rf'\d{{9}}\.png|{re.escape(GRID_FILE)}|{re.escape(ORIGIN_FILE)}')
UPLOADS = 8
"""Images that are sent to a remote folder at the same time."""
GREY = 96
GRID_CELL = 32  # pixels; smaller images are enlarged in grids by a whole factor


def to_uint8(images: Tensor) -> np.ndarray:
    """Quantise images.

    Args:
        images: Shape (B, C, H, W) with one or three channels, float in [0, 1]; values outside are clipped.

    Returns:
        Shape (B, H, W, 3), uint8, rounded to nearest.
    """
    pixels = (images.detach().float().cpu().clamp(0, 1) * 255).round().byte()
    return pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().numpy()


def make_grid(pixels: np.ndarray, columns: int | None = None, padding: int = 2) -> np.ndarray:
    """Arrange images of one size in rows.

    Args:
        pixels: Shape (N, H, W, 3), uint8, N at least 1.
        columns: Images per row; None for a square.
        padding: Grey pixels between images.

    Returns:
        One image, shape (rows, columns, 3), uint8.
    """
    count, height, width, _ = pixels.shape
    factor = max(1, GRID_CELL // max(height, width))
    pixels = pixels.repeat(factor, axis=1).repeat(factor, axis=2)
    height, width = height * factor, width * factor
    columns = min(count, columns or math.ceil(math.sqrt(count)))
    rows = -(-count // columns)
    grid = np.full((rows * (height + padding) + padding, columns * (width + padding) + padding, 3), GREY, np.uint8)
    for index, image in enumerate(pixels):
        top = padding + index // columns * (height + padding)
        left = padding + index % columns * (width + padding)
        grid[top : top + height, left : left + width] = image
    return grid


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


class ImageFolder:
    """Writes samples of one evaluation as ``<id>.png`` and, at the end, ``grid.png``.

    Files become visible whole. ``samples.json`` says of what samples the images are, so that they can be used again.

    Args:
        path: The folder, local or remote; images that an earlier evaluation left there are removed, other files are
            not.
        limit: Only samples with ids below it are written; None for all.
        grid_limit: At most so many samples are shown in the grid.
        origin: What the samples depend on, as plain data: weights, seeds, sampling arguments. None if it is not known.
        reuse: Keep the images that are there if they are of the same origin.

    Attributes:
        captions: Number of each sample that was written -> its caption.
    """

    def __init__(
        self,
        path: str | AnyPath,
        limit: int | None = None,
        grid_limit: int = 100,
        origin: Mapping[str, Any] | None = None,
        reuse: bool = False,
    ):
        self.path = as_path(path)
        self.limit = limit
        self.grid_limit = grid_limit
        self.captions: dict[int, str] = {}
        self._shown: dict[int, np.ndarray] = {}
        self._threads: ThreadPoolExecutor | None = None
        self._sent: deque[Future] = deque()
        if isinstance(self.path, Path):
            self.path.mkdir(parents=True, exist_ok=True)
        if not (reuse and is_of(self.path, origin)):
            for name in files.list_names(str(self.path)):
                if OWN_FILE.fullmatch(name):
                    files.remove_file(str(self.path / name))
            if origin is not None:
                files.write_text(str(self.path / ORIGIN_FILE), _origin_text(origin))

    def add(self, images: Tensor, ids: Sequence[int], captions: Sequence[str] | None = None) -> None:
        """Write samples.

        Args:
            images: Shape (B, C, H, W), float in [0, 1]; those with pixels that are not finite are left out.
            ids: Number of each sample.
            captions: What the page says about each; None for nothing.

        Raises:
            OSError: One of these or of those before could not be written.
        """
        finite = images.isfinite().flatten(1).all(dim=1).tolist()
        wanted = [row for row in range(len(ids)) if finite[row] and (self.limit is None or ids[row] < self.limit)]
        if not wanted:
            return
        for row, pixels in zip(wanted, to_uint8(images[wanted]), strict=True):
            self._save(pixels if images.shape[1] > 1 else pixels[..., 0], image_name(ids[row]))
            self.captions[ids[row]] = '' if captions is None else captions[row]
            if ids[row] < self.grid_limit:
                self._shown[ids[row]] = pixels

    def finish(self) -> np.ndarray | None:
        """Write the grid, and wait for what is on its way.

        Returns:
            The grid, shape (H, W, 3), uint8; None if no sample was written.

        Raises:
            OSError: A file could not be written.
        """
        grid = None
        if self._shown:
            grid = make_grid(in_one_size([self._shown[number] for number in sorted(self._shown)]))
            self._save(grid, GRID_FILE)
        while self._sent:
            self._sent.popleft().result()
        if self._threads is not None:
            self._threads.shutdown()
            self._threads = None
        return grid

    def _save(self, pixels: np.ndarray, name: str) -> None:
        content = io.BytesIO()
        Image.fromarray(pixels).save(content, 'PNG')
        if isinstance(self.path, Path):
            files.write_bytes(self.path / name, content.getvalue())
            return
        if self._threads is None:
            self._threads = ThreadPoolExecutor(UPLOADS, thread_name_prefix='images')
        if len(self._sent) >= 2 * UPLOADS:
            self._sent.popleft().result()
        self._sent.append(self._threads.submit(files.write_bytes, str(self.path / name), content.getvalue()))


class WrittenImages:
    """Images of an earlier evaluation of the same samples, for the one that measures them again.

    Args:
        path: Their folder.
        origin: What the samples depend on; images of other samples are not used.
    """

    def __init__(self, path: str | AnyPath, origin: Mapping[str, Any]):
        self.path = as_path(path)
        self._names = set(files.list_names(str(self.path))) if is_of(self.path, origin) else set()

    def read(self, ids: Sequence[int]) -> Tensor | None:
        """The images of some samples.

        Args:
            ids: Number of each sample.

        Returns:
            Shape (B, C, H, W), float in [0, 1]; None if one of them is missing or cannot be read.
        """
        if any(image_name(number) not in self._names for number in ids):
            return None
        try:
            return torch.stack([_read(str(self.path / image_name(number))) for number in ids])
        except (ValueError, RuntimeError, OSError, SyntaxError) as error:
            logger.warning('images of samples %s are made again: %s', ', '.join(map(str, ids[:4])), error)
            return None


def _read(path: str) -> Tensor:
    """An image (C, H, W) with the channels that it was written with."""
    with Image.open(io.BytesIO(files.read_bytes(path))) as image:
        pixels = np.array(image if image.mode == 'L' else image.convert('RGB'))
    return torch.from_numpy(pixels).reshape(*pixels.shape[:2], -1).permute(2, 0, 1).float() / 255


def image_name(number: int) -> str:
    """Name of the file of a sample."""
    return f'{number:09d}.png'


def is_image_name(name: str) -> bool:
    """Whether a file has the name of a sample."""
    return re.fullmatch(r'\d{9,}\.png', name) is not None


def is_of(path: str | AnyPath, origin: Mapping[str, Any] | None) -> bool:
    """Whether the images in a folder are of the samples that an origin describes."""
    file = str(as_path(path) / ORIGIN_FILE)
    return origin is not None and files.is_file(file) and files.read_text(file) == _origin_text(origin)


def _origin_text(origin: Mapping[str, Any]) -> str:
    return json.dumps(origin, indent=1, sort_keys=True, default=str)
