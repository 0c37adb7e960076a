"""Moments of 8 bits that are divided among processes: torchao's optimisers, and their state in checkpoints.

torchao keeps a moment as one code of 8 bits for every number and one scale for every block of numbers. Blocks are
counted from the first number that a process holds. A part that is small, or no whole number of blocks, is kept in the
parameter's own precision instead. So what a moment looks like depends on how it is divided, and a checkpoint keeps
every part as it is, in entries that name its first element in row-major order: ``exp_avg.codes[5120]`` and
``exp_avg.scale[5120]``, or ``exp_avg[5120]``. Divided alike, a resumed run reads back the same bits. Divided otherwise,
blocks that begin at the same elements are kept, and the rest is computed from the values and rounded anew.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lakonlab.parallel.state import local_part
from lakonlab.storage.pieces import Pieces

ENTRY = re.compile(r'(?P<slot>\w+)(?:\.(?P<kind>codes|scale))?\[(?P<first>\d+)\]')
SIGNED = 'exp_avg'
SlotInfos = Mapping[str, tuple[torch.Size, torch.dtype]]


class BlockMoments:
    """What is added to an optimiser of torchao: it sees the parts of parameters, and learning rates stay numbers.

    torchao takes divided parameters too. But its step is compiled, and torch's cache of what was compiled takes parts
    of different sizes for the same, since they are parts of the same tensor; and they make every operation dearer.
    """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """See the base class, which makes a tensor of the learning rate."""
        rate = param_group.get('lr', self.defaults['lr'])
        super().add_param_group(param_group)
        self.param_groups[-1]['lr'] = rate

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """See the base class."""
        groups = [(group, group['params'], group['lr']) for group in self.param_groups]
        parts = {parameter: _part_with_gradient(parameter) for _, parameters, _ in groups for parameter in parameters}
        on_cpu = all(part.device.type == 'cpu' for part in parts.values())
        for parameter, part in parts.items():
            if parameter in self.state:
                self.state[part] = self.state.pop(parameter)
        try:
            for group, parameters, rate in groups:
                group['params'] = [parts[parameter] for parameter in parameters]
                group['lr'] = torch.tensor(rate, dtype=torch.float32)
            with uncompiled() if on_cpu else contextlib.nullcontext():
                return super().step(closure)
        finally:
            for group, parameters, rate in groups:
                group['params'], group['lr'] = parameters, rate
            for parameter, part in parts.items():
                if part in self.state:
                    self.state[parameter] = self.state.pop(part)

    def empty_moment(self, parameter: nn.Parameter, slot: str) -> Tensor:
        """A moment of zeros of what this process holds of a parameter, quantised if it would be in training."""
        return self._new_buffer(local_part(parameter.detach()), slot == SIGNED)

    def values_of_codes(self, parameter: nn.Parameter, slot: str) -> Tensor:
        """The number in [-1, 1] that each of the 256 codes of a moment stands for."""
        block = torch.empty(self.block_size, device=parameter.device)
        return self._subclass_zeros(block, slot == SIGNED, self.block_size).qmap


def uncompiled() -> contextlib.AbstractContextManager:
    """Without compiling: on a CPU that takes longer than hundreds of steps, and a C++ compiler."""
    return torch.compiler.set_stance('force_eager')


@functools.cache
def block_optimizer(name: str) -> type[Optimizer]:
    """An optimiser of torchao.

    Args:
        name: Its name there, such as ``AdamW8bit``.

    Raises:
        ImportError: torchao is not installed.
    """
    import torchao.optim

    return type(name, (BlockMoments, getattr(torchao.optim, name)), {'__doc__': f"torchao's {name}."})


def has_parts(slots: Mapping[str, Any]) -> bool:
    """Whether a parameter's saved state is that of an optimiser of torchao."""
    return any(ENTRY.fullmatch(slot) for slot in slots)


def entries_of(slot: str, moment: Tensor, first: int) -> dict[str, Pieces]:
    """What a checkpoint holds of a process's part of a moment.

    Args:
        slot: Name of the moment.
        moment: The part.
        first: Number of the first element that it holds.

    Returns:
        Name of the entry -> the part, views.
    """
    if not _is_coded(moment):
        return {f'{slot}[{first}]': Pieces.whole(moment.reshape(-1))}
    return {
        f'{slot}.codes[{first}]': Pieces.whole(moment.codes.view(-1)),
        f'{slot}.scale[{first}]': Pieces.whole(moment.scale),
    }


@dataclass
class _Saved:
    """What one process held of a moment when it was saved."""

    first: int
    sizes: dict[str, int] = field(default_factory=dict)
    """Number of ``codes`` and ``scale``, or of the values themselves under an empty string."""
    dtype: torch.dtype = torch.uint8
    """Of codes or values."""

    @property
    def is_coded(self) -> bool:
        return 'codes' in self.sizes

    @property
    def size(self) -> int:
        return self.sizes['codes' if self.is_coded else '']

    @property
    def block_size(self) -> int | None:
        return self.size // self.sizes['scale'] if self.is_coded else None


@dataclass
class _Overlap:
    """What this process reads of a saved part; elements are counted from the first one that it holds itself."""

    saved: _Saved
    start: int
    stop: int
    content: Tensor
    scale: Tensor | None

    def values(self, first: int, values_of_codes: Tensor) -> Tensor:
        if self.scale is None:
            return self.content.float()
        begin = first + self.start - self.saved.first
        numbers = torch.arange(begin, begin + self.stop - self.start, device=self.content.device)
        blocks = numbers // self.saved.block_size - begin // self.saved.block_size
        return values_of_codes[self.content.int()] * self.scale[blocks]


class _Restoring:
    """A moment that is being filled.

    Args:
        part: What this process holds of the moment; zeros.
        first: Number of the first element that this process holds.
        saved: The saved parts.

    Raises:
        ValueError: They do not hold all of what this process needs.
    """

    def __init__(self, part: Tensor, first: int, saved: Sequence[_Saved]):
        self.first = first
        self._part = part
        self.is_same = any(_is_alike(part, first, other) for other in saved)
        """Whether the part was saved as it is divided now, and is read as it was."""
        bounds = [
            (other, max(other.first, first), min(other.first + other.size, first + part.numel())) for other in saved
        ]
        self._overlaps = [
            self._overlap(other, start - first, stop - first)
            for other, start, stop in sorted(bounds, key=lambda bound: bound[0].first)
            if start < stop
        ]
        number = sum(overlap.stop - overlap.start for overlap in self._overlaps)
        if number != part.numel():
            raise ValueError(f'{number} of {part.numel()} elements from {first} on are there')

    def wanted(self, slot: str) -> Iterator[tuple[str, Pieces]]:
        """Entries to read, and where to."""
        for overlap in self._overlaps:
            saved, begin = overlap.saved, self.first + overlap.start - overlap.saved.first
            if overlap.scale is None:
                yield f'{slot}[{saved.first}]', Pieces.stretch((saved.size,), begin, overlap.content)
            else:
                yield f'{slot}.codes[{saved.first}]', Pieces.stretch((saved.size,), begin, overlap.content)
                block, number = begin // saved.block_size, saved.sizes['scale']
                yield f'{slot}.scale[{saved.first}]', Pieces.stretch((number,), block, overlap.scale)

    def finish(self, values_of_codes: Tensor) -> bool:
        """Fill the moment after everything is read; whether its values are exactly those that were saved.

        Args:
            values_of_codes: See :meth:`BlockMoments.values_of_codes`.
        """
        if self.is_same:
            return True
        part = self._part
        values = torch.cat([overlap.values(self.first, values_of_codes) for overlap in self._overlaps]).view(part.shape)
        part.copy_(values)
        if not _is_coded(part):
            return torch.equal(part.float(), values)
        for overlap in self._overlaps:  # blocks that begin where they did are kept: rounding anew may change them
            saved, size = overlap.saved, part.block_size
            if saved.block_size == size and (saved.first - self.first) % size == 0:
                part.codes.view(-1)[overlap.start : overlap.stop] = overlap.content
                part.scale[overlap.start // size : overlap.stop // size] = overlap.scale
        return torch.equal(part.dequantize(), values)

    def _overlap(self, saved: _Saved, start: int, stop: int) -> _Overlap:
        part = self._part
        if self.is_same:
            is_coded = _is_coded(part)
            content = part.codes if is_coded else part
            return _Overlap(saved, start, stop, content.view(-1), part.scale if is_coded else None)
        content, scale = torch.empty(stop - start, dtype=saved.dtype, device=part.device), None
        if saved.is_coded:
            begin, end = self.first + start - saved.first, self.first + stop - saved.first
            number = (end - 1) // saved.block_size + 1 - begin // saved.block_size
            scale = torch.empty(number, device=part.device)
        return _Overlap(saved, start, stop, content, scale)


def restore(
    optimizer: BlockMoments,
    firsts: Mapping[nn.Parameter, int],
    saved: Mapping[nn.Parameter, SlotInfos],
    read: Callable[[dict[tuple[nn.Parameter, str], Pieces]], None],
) -> tuple[int, int]:
    """Restore what an optimiser remembers.

    Args:
        optimizer: The optimiser.
        firsts: Parameter -> number of the first element that this process holds; those of which it holds none are
            left out.
        saved: Parameter -> entry -> shape and dtype.
        read: Fills entries of parameters in place.

    Returns:
        Number of this process's moments, and how many of them could not keep the exact values that were saved.

    Raises:
        ValueError: Part of a moment was not saved.
    """
    states: dict[nn.Parameter, dict[str, Tensor]] = {parameter: {} for parameter in firsts if saved[parameter]}
    moments: dict[tuple[nn.Parameter, str], _Restoring] = {}
    wanted: dict[tuple[nn.Parameter, str], Pieces] = {}
    for parameter, state in states.items():
        parts: dict[str, dict[int, _Saved]] = {}
        for entry, (shape, dtype) in saved[parameter].items():
            match = ENTRY.fullmatch(entry)
            if match is None:
                state[entry] = torch.zeros(shape, dtype=dtype)
                wanted[parameter, entry] = Pieces.whole(state[entry])
                continue
            part = parts.setdefault(match['slot'], {}).setdefault(int(match['first']), _Saved(int(match['first'])))
            part.sizes[match['kind'] or ''] = shape.numel()
            if match['kind'] != 'scale':
                part.dtype = dtype
        for slot, by_first in parts.items():
            state[slot] = optimizer.empty_moment(parameter, slot)
            try:
                moment = _Restoring(state[slot], firsts[parameter], list(by_first.values()))
            except ValueError as error:
                raise ValueError(f'{slot}: {error}') from error
            moments[parameter, slot] = moment
            wanted.update({(parameter, entry): pieces for entry, pieces in moment.wanted(slot)})
    read(wanted)
    changed = 0
    with torch.no_grad():
        for (parameter, slot), moment in moments.items():
            changed += not moment.finish(optimizer.values_of_codes(parameter, slot))
    optimizer.state.update(states)
    return len(moments), changed


def _is_alike(part: Tensor, first: int, saved: _Saved) -> bool:
    if (first, part.numel()) != (saved.first, saved.size):
        return False
    if _is_coded(part):
        return saved.block_size == part.block_size
    return not saved.is_coded and saved.dtype == part.dtype and part.is_contiguous()


def _is_coded(part: Tensor) -> bool:
    return hasattr(part, 'codes')


def _part_with_gradient(parameter: nn.Parameter) -> Tensor:
    """What this process holds of a parameter and of its gradient, sharing their memory."""
    part = local_part(parameter.detach())
    part.grad = None if parameter.grad is None else local_part(parameter.grad)
    return part
