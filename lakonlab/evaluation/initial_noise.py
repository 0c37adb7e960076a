"""Which noise a sample started from, as a short hash by which samples of different runs can be told to share it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from lakonlab.ops.random_source import SeededSource

DIGITS = 16  # hexadecimal ones, which are 64 bits
DRAW = 'noise'
"""What models call the noise that they draw where the data set brings none."""


def noise_hashes(noise: Tensor) -> list[str]:
    """Hash of each row: of its shape, and of its values in single precision.

    Args:
        noise: Shape (B, ...), as the data set or the sampler drew it, before a model rearranges or casts it.

    Returns:
        B texts of hexadecimal digits. They depend on nothing else: not on the batch, the device or what stores the row.
    """
    rows = noise.detach().to('cpu', torch.float32).contiguous().numpy().astype('<f4', copy=False)
    shape = 'x'.join(map(str, rows.shape[1:])).encode()
    return [hashlib.sha256(shape + b':' + row.tobytes()).hexdigest()[:DIGITS] for row in rows]


def digest(hashes: Mapping[int, str | None]) -> str | None:
    """One hash of the noise of many samples, in whatever order they come.

    Args:
        hashes: Number of each sample -> hash of its noise.

    Returns:
        As many digits; None if there are no samples, or one of which it is not known.
    """
    if not hashes or None in hashes.values():
        return None
    text = '\n'.join(f'{number} {hashes[number]}' for number in sorted(hashes))
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]


class RecordingSource(SeededSource):
    """The same draws as those of a :class:`SeededSource`, of which it hashes the initial noise.

    Attributes:
        hashes: Of each row's initial noise; None as long as none was drawn.
    """

    hashes: list[str] | None = None

    def normal(self, name, shape, dtype=torch.float32, device='cpu'):
        if name != DRAW or self.hashes is not None:
            return super().normal(name, shape, dtype, device)
        exact = super().normal(name, shape, torch.float64)
        self.hashes = noise_hashes(exact)
        return exact.to(device=device, dtype=dtype)
