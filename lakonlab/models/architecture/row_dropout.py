"""Dropout whose mask of a row is a function of that row's key and of the layer's name, and of nothing else.

torch's own dropout draws from one global generator, so that a batch that is split over ranks or micro-batches loses
other features than the whole batch, and blocks that are recomputed need that generator wound back. Here each forward
pass of a trained network draws one key per row of its batch from the step's random source, and all layers derive their
masks from these keys. The bits of a mask are those of SplitMix64 (Steele, Lea & Flood, "Fast splittable pseudorandom
number generators", OOPSLA 2014), which is addressed by position: feature ``d`` of token ``t`` is dropped or kept
whatever tokens follow, so that it does not matter how far a neighbour's prompt makes a batch be padded. It is computed
with plain tensor operations, so that all devices agree, nothing waits for a device, and torch.compile sees no break.

``B`` rows, ``L`` tokens, ``D`` features.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

#: Name of the draw of the keys.
DRAW = 'network_dropout'
#: A mask spends 16 bits of a 64-bit word on each feature.
LEVELS, FEATURES_PER_WORD = 2**16, 4


def as_int64(word: int) -> int:
    """An unsigned 64-bit number as the signed one with the same bits, which is what tensors hold."""
    return word - 2**64 if word >= 2**63 else word


STEP = as_int64(0x9E3779B97F4A7C15)
MIXING = ((30, as_int64(0xBF58476D1CE4E5B9)), (27, as_int64(0x94D049BB133111EB)))
LAST_SHIFT = 31


def mixed(words: Tensor) -> Tensor:
    """The output function of SplitMix64, a bijection of 64-bit words after which neighbours look unrelated.

    Args:
        words: int64, any shape; not changed.

    Returns:
        int64, same shape.
    """
    for shift, factor in MIXING:
        words = words.bitwise_xor(shifted(words, shift)).mul_(factor)
    return words.bitwise_xor(shifted(words, LAST_SHIFT))


def shifted(words: Tensor, count: int) -> Tensor:
    """Shift to the right as if words were unsigned: torch's own shift fills in the sign."""
    return (words >> count).bitwise_and_(2 ** (64 - count) - 1)


def dropped_levels(probability: float) -> int:
    """A probability in [0, 1) in units of ``1 / LEVELS``, the precision that masks have."""
    return min(round(probability * LEVELS), LEVELS - 1)


def keep_mask(seeds: Tensor, size: Sequence[int], probability: float) -> Tensor:
    """Draw what to keep of each row.

    Args:
        seeds: One per row, int64, (B,).
        size: Shape of a row.
        probability: That of dropping an element, in [0, 1), rounded to a multiple of 2^-16.

    Returns:
        bool, (B, *size). A row is a function of its seed, and an element of its place in the flattened row.
    """
    count = math.prod(size)
    places = torch.arange(1, -(-count // FEATURES_PER_WORD) + 1, device=seeds.device)
    # places alone are never multiplied: compilers of loops may take it that what they count does not overflow
    words = mixed((seeds[:, None] + places) * STEP)
    levels = words.view(torch.int16)[:, :count]  # signed: from -LEVELS / 2
    return (levels >= dropped_levels(probability) - LEVELS // 2).reshape(len(seeds), *size)


def keys_of(uniform: Tensor) -> Tensor:
    """Keys of rows, from numbers in [0, 1) in double precision, all 53 bits of which are used.

    Args:
        uniform: float64, (B,).

    Returns:
        int64, (B,).
    """
    return (uniform * 2**53).long()


class RowKeys:
    """The random keys of the rows of the batch that is under way, which all dropout layers of a network share.

    Attributes:
        rows: int64, (B,), on the device of the batch; None between the forward passes that drop.
    """

    def __init__(self):
        self.rows: Tensor | None = None

    @contextlib.contextmanager
    def using(self, rows: Tensor | None) -> Iterator[None]:
        """Context in which the layers derive their masks from given keys.

        Args:
            rows: int64, (B,); None to let layers draw from torch's global state.
        """
        before, self.rows = self.rows, rows
        try:
            yield
        finally:
            self.rows = before


class RowDropout(nn.Dropout):
    """Dropout that is drawn row by row; see the module for how.

    Where nobody has drawn keys, such as when a part of a network is called on its own, it is torch's own dropout. In
    evaluation mode nothing is dropped.

    Args:
        p: Probability of dropping a feature, in [0, 1).
        place: Name of the layer, which tells its masks from those of other layers.
        keys: Keys of the network that the layer is part of.

    Raises:
        ValueError: ``p`` is out of range, or (when called) the first dimension of the input is not the batch.
    """

    def __init__(self, p: float, place: str, keys: RowKeys):
        if not 0 <= p < 1:
            raise ValueError(f'dropout of {place}: found a probability of {p}, expected at least 0 and less than 1')
        super().__init__(p)
        self.place = place
        self.keys = keys
        digest = hashlib.blake2b(place.encode(), digest_size=8).digest()
        # a tensor, since compiled code would be tied to the value of a number, and blocks could not share it; not a
        # buffer, since it neither moves nor is built without values
        self.layer = torch.tensor(as_int64(int.from_bytes(digest, 'little')), device='cpu')

    def forward(self, input: Tensor) -> Tensor:
        """Shape ``(B, *)`` to the same; what is kept is scaled, so that the mean stays."""
        rows = self.keys.rows
        if not self.training or self.p == 0:
            return input
        if rows is None:
            return F.dropout(input, self.p, training=True)
        if len(input) != len(rows):
            raise ValueError(
                f'{self.place}: the input has shape {tuple(input.shape)}, but the batch {len(rows)} rows. Dropout is '
                'drawn row by row, for which the batch must be the first dimension: leave the layer out of '
                'lora_target_modules, or set lora_dropout=0'
            )
        keep = keep_mask(mixed(rows + self.layer), input.shape[1:], self.p)
        return torch.where(keep, input * (LEVELS / (LEVELS - dropped_levels(self.p))), 0)


class RowCheckpoint:
    """Gradient checkpointing that recomputes a block with the keys of the forward pass that it belongs to.

    Between a forward and its backward pass there may be others, of the same network in this role or another.

    Args:
        keys: Keys of the network that the blocks are part of.
    """

    def __init__(self, keys: RowKeys):
        self.keys = keys

    def __call__(self, block: Callable, *args: Any) -> Any:
        """Call a block whose activations are recomputed in the backward pass."""
        if torch.compiler.is_compiling():  # the graph takes the keys as an input, for both passes
            return checkpoint(block, *args, use_reentrant=False)
        rows = self.keys.rows
        return checkpoint(
            block, *args, use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), self.keys.using(rows))
        )


def drop_by_row(network: nn.Module, name_of: Callable[[str], str | None] = lambda name: name) -> RowKeys | None:
    """Put a :class:`RowDropout` into the place of every dropout of a network that drops anything.

    Those that are there already get the same keys as the new ones, under the name that they have.

    Args:
        network: Changed in place; names of its parameters stay as they are.
        name_of: Name in the network -> name that the masks are derived from; None for a layer to leave alone.

    Returns:
        The keys; None if nothing is ever dropped.
    """
    keys = row_keys(network) or RowKeys()
    for path, module in list(network.named_modules(remove_duplicate=False)):
        if isinstance(module, RowDropout):
            module.keys = keys
        elif isinstance(module, nn.Dropout) and 0 < module.p < 1 and name_of(path) is not None:
            network.set_submodule(path, RowDropout(module.p, name_of(path), keys).train(module.training))
    return row_keys(network)


def row_keys(network: nn.Module) -> RowKeys | None:
    """The keys that the dropout layers of a network share; None if there are no such layers."""
    return next((module.keys for module in network.modules() if isinstance(module, RowDropout)), None)
