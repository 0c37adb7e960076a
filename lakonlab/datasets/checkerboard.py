"""Points of a checkerboard in the plane, drawn when they are asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lakonlab.ops.random_source import SeededSource
from lakonlab.registry import DATASETS


@DATASETS.register_module()
class CheckerboardData(Dataset):
    """Points spread uniformly over the white squares of a checkerboard, those with an even row + column.

    Item ``i`` is a function of ``seed`` and ``i`` alone, so any number of items costs no memory, and processes need not
    agree on anything. The items are independent draws: their order carries no information.

    Args:
        n_rc: Rows and columns of the board, at least 1.
        n_samples: Number of items; an integer, or a float of integral value such as ``1e8``.
        thickness: In (0, 1]; below 1 a square lacks the centred square of ``1 - thickness`` times its side.
        scale: Half the side of the board.
        shift: Centre of the board, (x, y).
        rotation: Angle of the board in degrees, counter-clockwise.
        test_mode: Draw other points than for training.
        seed: Seed of the points.

    Raises:
        ValueError: An argument is out of range.
    """

    independent_items = True

    def __init__(
        self,
        n_rc: int = 4,
        n_samples: float = 1e8,
        thickness: float = 1.0,
        scale: float = 1,
        shift: Sequence[float] = (0, 0),
        rotation: float = 0,
        test_mode: bool = False,
        seed: int = 0,
    ):
        if not isinstance(n_rc, int) or n_rc < 1:
            raise ValueError(f'n_rc={n_rc!r}: expected a positive number of rows and columns')
        if n_samples < 1 or n_samples != int(n_samples):
            raise ValueError(f'n_samples={n_samples!r}: expected a positive whole number')
        if not 0 < thickness <= 1:
            raise ValueError(f'thickness={thickness!r}: expected a number above 0 and up to 1')
        if not scale > 0:
            raise ValueError(f'scale={scale!r}: expected a positive number')
        if len(shift) != 2:
            raise ValueError(f'shift={shift!r}: expected two coordinates')
        self.n_rc = n_rc
        self.n_samples = int(n_samples)
        self.thickness = thickness
        self.scale = scale
        self.shift = torch.tensor([float(value) for value in shift], dtype=torch.float64)
        angle = math.radians(rotation)
        self.rotation = torch.tensor(
            [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=torch.float64
        )
        self.stream = 'held-out checkerboard' if test_mode else 'checkerboard'
        self.seed = seed
        self.white_squares = torch.tensor([[i, j] for i in range(n_rc) for j in range(n_rc) if (i + j) % 2 == 0])

    def __len__(self) -> int:
        return self.n_samples

    def points(self, indices: Sequence[int]) -> Tensor:
        """The points of the items in ``indices``, (B, 2), float32; no item depends on the others."""
        source = SeededSource(self.seed, row_ids=indices)
        choice, along, across = source.uniform(self.stream, (len(indices), 3), torch.float64).unbind(dim=1)
        # A hollow square is four equal rectangles, each the last one turned by a right angle: no draw is rejected.
        choice = (choice * 4 * len(self.white_squares)).long()
        width = self.thickness / 2
        corner = torch.stack([(1 - width) * along - 0.5, width * across - 0.5], dim=1)
        turned = torch.stack([-corner[:, 1], corner[:, 0]], dim=1)
        quarter = choice[:, None] % 4
        inside = torch.where(quarter % 2 == 0, corner, turned) * torch.where(quarter < 2, 1, -1)
        board = (self.white_squares[choice // 4] + 0.5 + inside) * (2 / self.n_rc) - 1
        return (board @ self.rotation.T * self.scale + self.shift).float()

    def __getitems__(self, indices: Sequence[int]) -> list[dict]:
        """The items of a batch, drawn together; see :meth:`__getitem__`."""
        for index in indices:
            if not 0 <= index < self.n_samples:
                raise IndexError(f'item {index} of a CheckerboardData data set of {self.n_samples}')
        return [{'ids': index, 'x': x} for index, x in zip(indices, self.points(indices).unbind())]

    def __getitem__(self, index: int) -> dict:
        """Return one item: ``ids`` int, and the point ``x`` (2,), float32.

        Args:
            index: Number of the item, ``0 <= index < len(self)``.

        Raises:
            IndexError: ``index`` is out of range.
        """
        return self.__getitems__([index])[0]
