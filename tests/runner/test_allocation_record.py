"""What the allocator gave out, against tensors whose sizes are known."""

import pytest
import torch

from lakonlab.runner.allocation_record import Allocation, AllocationRecord, planned, recording

KILOBYTE = 256  # elements of float32


def test_what_is_alive_at_once():
    before = torch.empty(4 * KILOBYTE)
    with recording() as record:
        first = torch.empty(3 * KILOBYTE)
        del before  # was there before
        second = torch.empty(5 * KILOBYTE)
        del first
        third = torch.empty(2 * KILOBYTE)
    assert record.peak() == 1024 * (3 + 5)
    del second, third
    assert len(record.allocations) == 3


def test_windows():
    with recording() as record:
        large = torch.empty(9 * KILOBYTE)
        del large
        kept = torch.empty(2 * KILOBYTE)
        with record.window():
            small = torch.empty(KILOBYTE)
            del small
        after = torch.empty(7 * KILOBYTE)
    assert record.peak() == 1024 * (2 + 1)
    del kept, after


def test_temporaries_of_a_formula_count():
    x = torch.ones(64 * KILOBYTE)
    with recording() as record:
        (x + 1).mul(2).sum()
    assert record.peak() == pytest.approx(2 * x.nbytes, rel=0.01)


def test_the_tiles_of_a_kernel_are_scratch():
    """Attention on CPUs takes a buffer for every thread; a plan counts what it returns."""
    x = torch.ones(2, 3, 256, 32)
    with recording() as record, torch.no_grad():
        result = torch.nn.functional.scaled_dot_product_attention(x, x, x)
    tiles = [allocation for allocation in record.allocations if allocation.is_scratch]
    assert tiles
    assert record.peak() == pytest.approx(result.nbytes, rel=0.05)


def test_backward_passes_count():
    x = torch.ones(64 * KILOBYTE, requires_grad=True)
    with recording() as record:
        (x.exp() * 2).sum().backward()
    assert record.peak() >= 2 * x.nbytes
    live = sum(allocation.size for allocation in record.allocations if allocation.end is None)
    assert live == x.grad.nbytes


def test_what_a_plan_does_not_count():
    def allocation(size, start, end, made_in=('aten::mm',), is_scratch=False):
        return Allocation(size, start, end, made_in, is_scratch)

    record = AllocationRecord(
        [
            allocation(1, 0, None),
            allocation(10, 1, 9),
            allocation(100, 2, 3, is_scratch=True),
            allocation(1000, 4, 5, ('aten::empty', 'c10d::allgather_')),
            allocation(1000, 5, 6, ('aten::empty', 'gloo:all_gather')),
            allocation(10000, 9, 10),  # where another ends
        ]
    )
    assert record.peak() == 10001
    assert record.peak(lambda entry: planned(entry) and entry.size < 10000) == 11
    assert record.peak(lambda entry: not entry.is_of_backend and entry.size < 10000) == 111
    assert record.peak(lambda entry: entry.size < 10000) == 1011
