"""Sinusoidal embeddings of time and position (Vaswani et al., "Attention is all you need", 2017).

``B`` batch, ``L`` tokens, ``D`` embedding width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn


class TableCache:
    """Constant tables of a network, made once per key and device.

    They are no buffers: a network that was built on the meta device and then given memory by ``to_empty`` would hold
    uninitialised ones, and no checkpoint needs them.

    Args:
        make: Computes the table of a key, on the CPU.
    """

    def __init__(self, make: Callable[..., Tensor]):
        self.make = make
        self._tables: dict[tuple, Tensor] = {}

    def get(self, device: torch.device, *key) -> Tensor:
        """Return the table of ``key`` on ``device``."""
        if torch.compiler.is_compiling():  # the graph makes its own: it cannot enter the contexts below
            return self.make(*key).to(device)
        found = self._tables.get((device, key))
        if found is None:
            # an inference tensor could not be used in training later; a default device of "meta" must not apply
            with torch.inference_mode(False), torch.device('cpu'):
                table = self.make(*key)
            found = self._tables[device, key] = table.to(device)
        return found


def time_frequencies(width: int, frequency_shift: float = 0.0, max_period: float = 10000.0) -> Tensor:
    """Angular frequencies ``max_period ** (-i / (width / 2 - frequency_shift))``, shape ``(width / 2,)``, float32."""
    half = width // 2
    exponent = torch.arange(half, dtype=torch.float32) * (-math.log(max_period) / (half - frequency_shift))
    return exponent.exp()


def cos_sin(angles: Tensor) -> Tensor:
    """Cosines, then sines, along the last dimension."""
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def position_table(width: int, base_size: int, rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Sine and cosine embedding of the positions of a token grid, in row-major order.

    Positions are scaled so that any grid spans the range of a ``base_size`` x ``base_size`` grid, which resizes the
    table of a network to other image sizes. The first half of the embedding is of the column, the second of the row.

    Args:
        width: Embedding width ``D``, a multiple of 4.
        base_size: Tokens per side at the size the network was trained at.
        rows: Tokens from top to bottom.
        columns: Tokens from left to right.
        dtype: Dtype of the result.

    Returns:
        Shape ``(1, rows * columns, D)``.
    """
    if width % 4:
        raise ValueError(f'a 2-D position table needs a width that is a multiple of 4, got {width}')
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))

    def embed(positions: Tensor) -> Tensor:
        angles = positions.flatten()[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    row = torch.arange(rows, dtype=torch.float64) * (base_size / rows)
    column = torch.arange(columns, dtype=torch.float64) * (base_size / columns)
    row, column = torch.meshgrid(row, column, indexing='ij')
    return torch.cat([embed(column), embed(row)], dim=1).to(dtype)[None]


class TimestepEmbedder(nn.Module):
    """Embeds the network's time: sinusoid, then two linear layers.

    Args:
        in_features: Width of the sinusoid.
        out_features: Width ``D`` of the result.
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.linear_1 = nn.Linear(in_features, out_features)
        self.act = nn.SiLU()
        self.linear_2 = nn.Linear(out_features, out_features)
        self.tables = TableCache(partial(time_frequencies, in_features))

    def forward(self, timestep: Tensor) -> Tensor:
        """Embed times of shape ``(B,)``; returns ``(B, D)``. The angles are always computed in float32."""
        frequencies = self.tables.get(timestep.device)
        sinusoid = cos_sin(timestep.float()[:, None] * frequencies)
        return self.linear_2(self.act(self.linear_1(sinusoid.to(self.linear_1.weight.dtype))))
