"""Sampled images as files: one PNG per sample, a grid to look at, and a page."""

from __future__ import annotations

import io
import json
import logging
import re
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from lakonlab.evaluation.sample_grid import sample_grid, shrunk
from lakonlab.storage import files
from lakonlab.storage.remote_path import AnyPath, as_path

logger = logging.getLogger('lakonlab.evaluation')

GRID_FILE = 'grid.png'
ORIGIN_FILE = 'samples.json'
NOISE_TEXT = 'initial-noise'
"""Keyword of the text in the file of a sample that holds the hash of the noise it started from."""
OWN_FILE = re.compile(rf'\d{{9}}\.png|{re.escape(GRID_FILE)}|{re.escape(ORIGIN_FILE)}')
UPLOADS = 8
"""Images that are sent to a remote folder at the same time."""


def to_uint8(images: Tensor) -> np.ndarray:
    """Quantise images.

    Args:
        images: Shape (B, C, H, W) with one or three channels, float in [0, 1]; values outside are clipped.

    Returns:
        Shape (B, H, W, 3), uint8, rounded to nearest.
    """
    pixels = (images.detach().float().cpu().clamp(0, 1) * 255).round().byte()
    return pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().numpy()


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
        noise: The same -> hash of the noise it started from, or None; its file holds it too.
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
        self.noise: dict[int, str | None] = {}
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

    def add(
        self,
        images: Tensor,
        ids: Sequence[int],
        captions: Sequence[str] | None = None,
        noise: Sequence[str | None] | None = None,
    ) -> None:
        """Write samples.

        Args:
            images: Shape (B, C, H, W), float in [0, 1]; those with pixels that are not finite are left out.
            ids: Number of each sample.
            captions: What the page says about each; None for nothing.
            noise: Hash of the noise that each started from; None where it is not known.

        Raises:
            OSError: One of these or of those before could not be written.
        """
        finite = images.isfinite().flatten(1).all(dim=1).tolist()
        wanted = [row for row in range(len(ids)) if finite[row] and (self.limit is None or ids[row] < self.limit)]
        if not wanted:
            return
        for row, pixels in zip(wanted, to_uint8(images[wanted]), strict=True):
            started_from = None if noise is None else noise[row]
            self._save(pixels if images.shape[1] > 1 else pixels[..., 0], image_name(ids[row]), started_from)
            self.noise[ids[row]] = started_from
            self.captions[ids[row]] = '' if captions is None else captions[row]
            if ids[row] < self.grid_limit:
                self._shown[ids[row]] = shrunk(pixels)

    def finish(self) -> np.ndarray | None:
        """Write the grid, and wait for what is on its way.

        Returns:
            The grid, shape (H, W, 3), uint8; None if no sample was written.

        Raises:
            OSError: A file could not be written.
        """
        grid = None
        if self._shown:
            shown = sorted(self._shown)
            grid = sample_grid([self._shown[number] for number in shown], [self.captions[number] for number in shown])
            self._save(grid, GRID_FILE)
        while self._sent:
            self._sent.popleft().result()
        if self._threads is not None:
            self._threads.shutdown()
            self._threads = None
        return grid

    def _save(self, pixels: np.ndarray, name: str, noise: str | None = None) -> None:
        content, texts = io.BytesIO(), PngImagePlugin.PngInfo()
        if noise is not None:
            texts.add_text(NOISE_TEXT, noise)
        Image.fromarray(pixels).save(content, 'PNG', pnginfo=texts)
        if isinstance(self.path, Path):
            files.write_bytes(self.path / name, content.getvalue())
            return
        if self._threads is None:
            self._threads = ThreadPoolExecutor(UPLOADS, thread_name_prefix='images')
        if len(self._sent) >= 2 * UPLOADS:
            self._sent.popleft().result()
        self._sent.append(self._threads.submit(files.write_bytes, str(self.path / name), content.getvalue()))


class Written(NamedTuple):
    """What files hold of some samples.

    Args:
        images: Shape (B, C, H, W), float in [0, 1].
        noise: Hash of the noise that each started from; None for one whose file does not say.
    """

    images: Tensor
    noise: list[str | None]


class WrittenImages:
    """Images of an earlier evaluation of the same samples, for the one that measures them again.

    Args:
        path: Their folder.
        origin: What the samples depend on; images of other samples are not used.

    Attributes:
        problem: Why none of the images can be used; None if they can.
    """

    def __init__(self, path: str | AnyPath, origin: Mapping[str, Any]):
        self.path = as_path(path)
        names = set(files.list_names(str(self.path)))
        self.problem = _problem(self.path, names, origin)
        self._names = names if self.problem is None else set()

    def read(self, ids: Sequence[int]) -> Written | None:
        """What was written of some samples.

        Args:
            ids: Number of each sample.

        Returns:
            Their images; None if one of them is missing or cannot be read.
        """
        if any(image_name(number) not in self._names for number in ids):
            return None
        try:
            images, noise = zip(*(_read(str(self.path / image_name(number))) for number in ids), strict=True)
            return Written(torch.stack(images), list(noise))
        except (ValueError, RuntimeError, OSError, SyntaxError) as error:
            logger.warning('images of samples %s are made again: %s', ', '.join(map(str, ids[:4])), error)
            return None


def _problem(path: AnyPath, names: Collection[str], origin: Mapping[str, Any]) -> str | None:
    """Why images in a folder are not those of the samples that an origin describes."""
    if not any(OWN_FILE.fullmatch(name) for name in names):
        return f'there are no images in {path}'
    if is_of(path, origin):
        return None
    if ORIGIN_FILE not in names:
        return f'{path} has no {ORIGIN_FILE}, which says of what weights its images are, as those of a training run'
    try:
        there, here = json.loads(files.read_text(str(path / ORIGIN_FILE))), json.loads(_origin_text(origin))
        differing = sorted(key for key in {*there, *here} if there.get(key) != here.get(key))
    except (ValueError, AttributeError, TypeError):  # damaged
        differing = []
    return f'the images in {path} are of other samples: {ORIGIN_FILE} differs in {", ".join(differing) or "all"}'


def _read(path: str) -> tuple[Tensor, str | None]:
    """An image (C, H, W) with the channels that it was written with, and the hash of its noise."""
    with Image.open(io.BytesIO(files.read_bytes(path))) as image:
        pixels = np.array(image if image.mode == 'L' else image.convert('RGB'))
        noise = image.info.get(NOISE_TEXT)
    return torch.from_numpy(pixels).reshape(*pixels.shape[:2], -1).permute(2, 0, 1).float() / 255, noise


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
