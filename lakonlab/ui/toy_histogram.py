"""The picture of a toy experiment in the plane: a histogram of points, and where they may be saved."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from torch import Tensor

PICTURE_SIZE = 200
"""Pixels along each side of the picture."""
EXTENT = 4.2
"""The picture shows [-EXTENT, EXTENT] in both coordinates."""
BRIGHTEST_COUNT, BRIGHTEST_SAMPLES = 160, 1_000_000
"""Points in one of 200 x 200 cells, of so many points in all, that have the last colour."""


def histogram(points: Tensor, cells: int = PICTURE_SIZE, extent: float = EXTENT) -> Tensor:
    """Count points in square cells.

    Args:
        points: Points (x, y), (N, 2).
        cells: Cells along each side.
        extent: The cells cover [-extent, extent] in both coordinates; points elsewhere are left out.

    Returns:
        Counts (cells, cells), int64: the first row holds the largest y, as pictures do.
    """
    cell = ((points.detach().cpu().double() / extent + 1) * cells / 2).floor()
    inside = ((cell >= 0) & (cell < cells)).all(dim=1)  # a point that is no number is nowhere
    column, row = cell[inside].long().unbind(dim=1)
    return ((cells - 1 - row) * cells + column).bincount(minlength=cells * cells).view(cells, cells)


def picture(points: Tensor, cells: int = PICTURE_SIZE) -> np.ndarray:
    """Colour a histogram with viridis; the same density has the same colour whatever the numbers of points and cells.

    Args:
        points: Points (x, y), (N, 2), N at least 1.
        cells: Cells along each side, a divisor of 200.

    Returns:
        Shape (200, 200, 3), uint8.

    Raises:
        ValueError: No points, or another number of cells.
    """
    if len(points) == 0:
        raise ValueError('there are no points to draw')
    if cells < 1 or PICTURE_SIZE % cells:
        raise ValueError(f'cells={cells}: expected a divisor of {PICTURE_SIZE}')
    from matplotlib import colormaps

    brightest = BRIGHTEST_COUNT * len(points) / BRIGHTEST_SAMPLES * (PICTURE_SIZE / cells) ** 2
    colours = colormaps['viridis']((histogram(points, cells) / brightest).clamp(max=1).numpy(), bytes=True)[..., :3]
    return colours.repeat(PICTURE_SIZE // cells, axis=0).repeat(PICTURE_SIZE // cells, axis=1)


def share_on_white_squares(points: Tensor, scale: float, n_rc: int = 4) -> float:
    """Share of the points that lie on white squares of :class:`lakonlab.datasets.checkerboard.CheckerboardData`.

    Args:
        points: Points (x, y), (N, 2), N at least 1.
        scale: Half the side of the board.
        n_rc: Rows and columns of the board.
    """
    square = ((points.detach().double() / scale + 1) * n_rc / 2).floor()
    on_board = ((square >= 0) & (square < n_rc)).all(dim=1)
    return (on_board & (square.sum(dim=1) % 2 == 0)).double().mean().item()


def writable_picture(path: str | Path) -> Path:
    """Make sure, before a long computation, that a picture can be written; its directory is created.

    Raises:
        ValueError: The path is a directory, not a PNG, or nothing can be written there.
    """
    path = Path(path)
    if path.suffix.lower() != '.png':
        raise ValueError(f'{path}: expected the path of a .png file')
    if path.is_dir():
        raise ValueError(f'{path}: is a directory; expected the path of a .png file')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ValueError(f'{path}: cannot be written there: {error}') from error
    return path


def save_picture(pixels: np.ndarray, path: str | Path) -> None:
    """Write an image (H, W, 3), uint8, as a PNG file."""
    from PIL import Image

    Image.fromarray(pixels).save(path, optimize=True)
