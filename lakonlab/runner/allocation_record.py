"""What torch's allocator of the CPU gave out while something ran: the counterpart of a memory plan.

The record is the profiler's. It knows every tensor whoever made it, unlike resident memory, which also depends on what
the system keeps of freed memory. Two kinds of allocations are no part of a plan and can be told apart:

* *Scratch*: what one operation allocates and frees for itself, such as a weight that oneDNN packs for a product in
  bfloat16, or the tiles of an attention kernel. It differs from processor to processor, and with the number of threads.
* *Copies of the backend*: gloo copies what it gathers and reduces; nccl does not. Its threads free them unrecorded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

WINDOW = 'lakonlab.allocation_record.window'
BACKEND = ('c10d::', 'gloo:', 'nccl:')
FACTORIES = ('aten::empty', 'aten::empty_like', 'aten::empty_strided', 'aten::zeros', 'aten::zeros_like')
"""Operations that allocate for the one which calls them."""


@dataclass(frozen=True)
class Allocation:
    """A stretch of memory from when it was allocated until it was freed."""

    size: int
    """Bytes."""
    start: int
    """Nanoseconds."""
    end: int | None
    """Nanoseconds; None if it was not freed while the record was kept."""
    made_in: tuple[str, ...]
    """Names of the operations in which it was allocated, innermost first."""
    is_scratch: bool
    """Whether one operation of torch allocated it and freed it again."""

    @property
    def is_of_backend(self) -> bool:
        """Whether it was made inside an exchange among processes."""
        return any(name.startswith(BACKEND) for name in self.made_in)


def planned(allocation: Allocation) -> bool:
    """Whether an allocation is of the kind that a plan counts."""
    return not allocation.is_scratch and not allocation.is_of_backend


@dataclass
class AllocationRecord:
    """Everything that was allocated, in order; filled when :func:`recording` ends."""

    allocations: list[Allocation] = field(default_factory=list)
    windows: list[tuple[int, int]] = field(default_factory=list)

    @contextlib.contextmanager
    def window(self) -> Iterator[None]:
        """A stretch of the record in which :meth:`peak` looks; all of it if there is none."""
        with record_function(WINDOW):
            yield

    def peak(self, counts: Callable[[Allocation], bool] = planned) -> int:
        """Most bytes that were allocated at once, in any of the windows.

        Args:
            counts: Which allocations count; by default those that a plan counts.
        """
        changes = []
        for allocation in filter(counts, self.allocations):
            changes.append((allocation.start, allocation.size))
            if allocation.end is not None:
                changes.append((allocation.end, -allocation.size))
        changes += [(moment, 0) for window in self.windows for moment in window]
        live = most = 0
        for moment, change in sorted(changes):
            live += change
            if not self.windows or any(start <= moment <= end for start, end in self.windows):
                most = max(most, live)
        return most


@contextlib.contextmanager
def recording() -> Iterator[AllocationRecord]:
    """Record what is allocated in this thread, and in backward passes that it starts.

    Yields:
        The record, complete after the block.
    """
    record = AllocationRecord()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield record
    _read(profiler.profiler.kineto_results.experimental_event_tree(), record)


def _read(tree: list[Any], record: AllocationRecord) -> None:
    from torch._C._profiler import _EventType

    events, nodes = [], list(tree)
    while nodes:
        node = nodes.pop()
        nodes.extend(node.children)
        if node.typed[0] == _EventType.Allocation:
            events.append(node)
        elif node.name == WINDOW:
            record.windows.append((node.start_time_ns, node.end_time_ns))
    events.sort(key=lambda event: event.start_time_ns)
    live: dict[int, Any] = {}
    for event in events:
        # a place that is given out again was freed by a thread that is not recorded
        before = live.pop(event.typed[1].ptr, None)
        if before is not None:
            record.allocations.append(_allocation(before, event))
        if event.typed[1].alloc_size > 0:
            live[event.typed[1].ptr] = event
    record.allocations += [_allocation(event, None) for event in live.values()]
    record.allocations.sort(key=lambda allocation: allocation.start)


def _allocation(made: Any, freed: Any | None) -> Allocation:
    made_in, node = [], made.parent
    while node is not None:
        made_in.append(node.name)
        node = node.parent
    maker = made.parent
    while maker is not None and maker.name in FACTORIES and maker.parent is not None:
        maker = maker.parent
    is_scratch = (
        freed is not None
        and freed.typed[1].alloc_size < 0
        and freed.parent is not None
        and maker is not None
        and freed.parent.id == maker.id
        and maker.name.startswith('aten::')
    )
    end = None if freed is None else freed.start_time_ns
    return Allocation(made.typed[1].alloc_size, made.start_time_ns, end, tuple(made_in), is_scratch)
