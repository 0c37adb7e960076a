"""Where every random number of a training or sampling step comes from.

A step never calls ``torch.rand`` itself: it asks a *source* for a draw by name (``raw_t``, ``noise``, ``dropout``,
``student_intervals``, ``teacher_intervals``, ``label_dropout``, ...). The first dimension of a draw is the batch. Four
sources cover all uses: :class:`SeededSource` (training: each row is a function of seed, step, name and row, so that
neither resuming nor splitting a batch over ranks changes it), :class:`TorchSource` (a ``torch.Generator`` or torch's
global state, as users of diffusers expect), :class:`PerRowSource` (a generator per row) and :class:`RecordedSource`
(replays given tensors, for tests).
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

import numpy as np
import torch
from torch import Tensor


class RandomSource(ABC):
    """Named random draws; shape ``(B, ...)``, the first dimension being the batch."""

    @abstractmethod
    def uniform(
        self, name: str, shape: Sequence[int], dtype: torch.dtype = torch.float32, device: torch.device | str = 'cpu'
    ) -> Tensor:
        """Draw from U[0, 1)."""

    @abstractmethod
    def normal(
        self, name: str, shape: Sequence[int], dtype: torch.dtype = torch.float32, device: torch.device | str = 'cpu'
    ) -> Tensor:
        """Draw from N(0, 1)."""

    def categorical(self, name: str, probabilities: Tensor, num_samples: int) -> Tensor:
        """Draw indices with given probabilities, by the inverse of their cumulative sum.

        Args:
            name: Name of the draw.
            probabilities: (B, ..., K), summing to 1 over the last dimension.
            num_samples: S.

        Returns:
            Indices, (B, ..., S), int64.
        """
        shape = (*probabilities.shape[:-1], num_samples)
        uniform = self.uniform(name, shape, torch.float32, probabilities.device).to(probabilities.dtype)
        cumulative = probabilities.cumsum(dim=-1)
        # scaled by the total, which rounding may leave below 1; the last index is never exceeded
        target = uniform * cumulative[..., -1:]
        return torch.searchsorted(cumulative, target, right=True).clamp(max=probabilities.shape[-1] - 1)

    def rows(self, start: int, count: int) -> RandomSource:
        """The source of a micro-batch made of rows ``start`` to ``start + count`` of this source's batch."""
        return self


class TorchSource(RandomSource):
    """Draws in call order from a ``torch.Generator``, or from torch's global state.

    Args:
        generator: The generator, on any device; None for the global state of the requested device.
    """

    def __init__(self, generator: torch.Generator | None = None):
        self.generator = generator

    def _draw(self, sample, shape, dtype, device) -> Tensor:
        if self.generator is None:
            return sample(tuple(shape), dtype=dtype, device=device)
        return sample(tuple(shape), dtype=dtype, device=self.generator.device, generator=self.generator).to(device)

    def uniform(self, name, shape, dtype=torch.float32, device='cpu'):
        return self._draw(torch.rand, shape, dtype, device)

    def normal(self, name, shape, dtype=torch.float32, device='cpu'):
        return self._draw(torch.randn, shape, dtype, device)


class PerRowSource(RandomSource):
    """Draws each row from a generator of its own, so that a row does not depend on the batch it is in.

    Args:
        generators: One per row.

    Raises:
        ValueError: A draw has another number of rows.
    """

    def __init__(self, generators: Sequence[torch.Generator]):
        self.sources = [TorchSource(generator) for generator in generators]

    def _rows(self, shape: Sequence[int], draw) -> Tensor:
        if shape[0] != len(self.sources):
            raise ValueError(f'{shape[0]} rows are drawn, but there are {len(self.sources)} generators')
        return torch.cat([draw(source, (1, *shape[1:])) for source in self.sources])

    def uniform(self, name, shape, dtype=torch.float32, device='cpu'):
        return self._rows(shape, lambda source, row: source.uniform(name, row, dtype, device))

    def normal(self, name, shape, dtype=torch.float32, device='cpu'):
        return self._rows(shape, lambda source, row: source.normal(name, row, dtype, device))

    def rows(self, start: int, count: int) -> RandomSource:
        return PerRowSource([source.generator for source in self.sources[start : start + count]])


class RecordedSource(RandomSource):
    """Replays recorded tensors, by name and in the order of the calls for that name.

    Args:
        draws: Name -> the tensors to return, one per call.

    Raises:
        KeyError: A draw was asked for that is not recorded.
        ValueError: A recorded tensor has another number of elements than the draw.
    """

    def __init__(self, draws: Mapping[str, Iterable[Tensor]]):
        self.remaining = {name: list(tensors) for name, tensors in draws.items()}

    def _replay(self, name, shape, dtype, device) -> Tensor:
        if not self.remaining.get(name):
            raise KeyError(f'no recorded draw is left for {name!r}; recorded names: {sorted(self.remaining)}')
        tensor = self.remaining[name].pop(0)
        if tensor.numel() != np.prod(shape, dtype=int):
            raise ValueError(f'recorded draw {name!r} has shape {tuple(tensor.shape)}, {tuple(shape)} is needed')
        return tensor.reshape(tuple(shape)).to(device=device, dtype=dtype)

    def uniform(self, name, shape, dtype=torch.float32, device='cpu'):
        return self._replay(name, shape, dtype, device)

    def normal(self, name, shape, dtype=torch.float32, device='cpu'):
        return self._replay(name, shape, dtype, device)

    def categorical(self, name, probabilities, num_samples):
        shape = (*probabilities.shape[:-1], num_samples)
        return self._replay(name, shape, torch.int64, probabilities.device)


class SeededSource(RandomSource):
    """Draws whose every row is a pure function of (seed, step, name, how often the name was drawn, row number).

    The generator is counter-based (Philox 4x64; Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011):
    the key is a hash of everything but the row, the row number selects a range of counters, and a rank draws its own
    rows without drawing those of the others.

    Args:
        seed: Seed of the run.
        step: Iteration, or any other number that tells two uses of the source apart.
        row_ids: Global number of each row of the batch; None for 0, 1, 2, ....
        first_row: Offset of the batch's first row, used where ``row_ids`` is None.
    """

    def __init__(self, seed: int, step: int = 0, row_ids: Sequence[int] | None = None, first_row: int = 0):
        self.seed, self.step = int(seed), int(step)
        self.row_ids = None if row_ids is None else [int(row) for row in row_ids]
        self.first_row = int(first_row)
        self._num_draws: dict[str, int] = {}

    def rows(self, start: int, count: int) -> SeededSource:
        if self.row_ids is not None:
            return SeededSource(self.seed, self.step, self.row_ids[start : start + count])
        return SeededSource(self.seed, self.step, first_row=self.first_row + start)

    def _words(self, name: str, shape: Sequence[int], words_per_row: int) -> np.ndarray:
        """Random 64-bit words, shape ``(B, words_per_row)``."""
        draw = self._num_draws.get(name, 0)
        self._num_draws[name] = draw + 1
        digest = hashlib.blake2b(f'{self.seed}:{self.step}:{name}:{draw}'.encode(), digest_size=16).digest()
        key = np.frombuffer(digest, dtype=np.uint64)
        blocks_per_row = -(-words_per_row // 4)  # Philox 4x64 makes four words of each counter
        ids = self.row_ids
        if ids is None:
            ids = range(self.first_row, self.first_row + shape[0])
        elif len(ids) != shape[0]:
            raise ValueError(f'draw {name!r} has {shape[0]} rows, but the source was given {len(ids)} row_ids')
        chunks = []
        for _, run in groupby(enumerate(ids), key=lambda pair: pair[1] - pair[0]):  # runs of consecutive ids
            run = [row for _, row in run]
            counter = run[0] * blocks_per_row
            bits = np.random.Philox(key=key, counter=[counter & (2**64 - 1), counter >> 64, 0, 0])
            chunks.append(bits.random_raw(len(run) * blocks_per_row * 4).reshape(len(run), -1))
        return np.concatenate(chunks)[:, :words_per_row]

    def uniform(self, name, shape, dtype=torch.float32, device='cpu'):
        size = int(np.prod(shape[1:], dtype=int))
        words = self._words(name, shape, size)
        # 24 bits for single precision, so that rounding cannot reach 1
        bits = 53 if dtype == torch.float64 else 24
        values = (words >> np.uint64(64 - bits)).astype(np.float64) * 2.0**-bits
        return torch.from_numpy(values).reshape(tuple(shape)).to(device=device, dtype=dtype)

    def normal(self, name, shape, dtype=torch.float32, device='cpu'):
        size = int(np.prod(shape[1:], dtype=int))
        pairs = -(-size // 2)
        words = self._words(name, shape, 2 * pairs)
        unit = ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53  # never 0, so the logarithm is finite
        # Box & Muller, "A note on the generation of random normal deviates" (1958)
        radius, angle = np.sqrt(-2 * np.log(unit[:, :pairs])), 2 * np.pi * unit[:, pairs:]
        values = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)[:, :size]
        return torch.from_numpy(np.ascontiguousarray(values)).reshape(tuple(shape)).to(device=device, dtype=dtype)
