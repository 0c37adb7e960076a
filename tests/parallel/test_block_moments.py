"""Moments of 8 bits that were saved in other parts than they are read in."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lakonlab.parallel.block_moments import block_optimizer, entries_of, has_parts, restore

pytest.importorskip('torchao', reason='needs torchao: pip install torchao')

SLOTS = ('exp_avg', 'exp_avg_sq')
BLOCK = 256
LEAST = 4096
"""Fewer elements are not quantised."""
HALF_STEP = 0.008
"""Half of the widest distance of two codes, relative to the largest number of a block."""


def optimizer_of(size, **options):
    parameter = nn.Parameter(torch.zeros(size))
    return parameter, block_optimizer('AdamW8bit')([parameter], **options)


def moments_of(size):
    """Drawn moments, of very different sizes."""
    generator = torch.Generator().manual_seed(size)
    values = torch.randn(size, generator=generator) * torch.logspace(-6, 0, size)
    return {'exp_avg': values, 'exp_avg_sq': values.square()}


def save(values, bounds, **options):
    """What a checkpoint holds of moments in parts, and their values."""
    entries, saved = {}, {slot: torch.empty_like(value) for slot, value in values.items()}
    for start, stop in itertools.pairwise(bounds):
        parameter, optimizer = optimizer_of(stop - start, **options)
        for slot, value in values.items():
            moment = optimizer.empty_moment(parameter, slot)
            moment.copy_(value[start:stop])
            saved[slot][start:stop] = value_of(moment)
            for entry, pieces in entries_of(slot, moment, start).items():
                entries[entry] = pieces.tensors[0].clone()
    entries['step'] = torch.tensor(7.0)
    return entries, saved


def load(entries, start, stop, **options):
    """Moments from ``start`` to ``stop``, and what :func:`restore` says of them."""
    parameter, optimizer = optimizer_of(stop - start, **options)

    def read(wanted):
        for (_, entry), pieces in wanted.items():
            source = entries[entry]
            assert pieces.shape == tuple(source.shape)
            assert pieces.dtype == source.dtype
            for (offsets, sizes), target in zip(pieces.boxes, pieces.tensors):
                target.copy_(source[tuple(slice(i, i + n) for i, n in zip(offsets, sizes))])

    infos = {entry: (tensor.shape, tensor.dtype) for entry, tensor in entries.items()}
    counts = restore(optimizer, {parameter: start}, {parameter: infos}, read)
    state = optimizer.state[parameter]
    assert state['step'] == 7
    return {slot: state[slot] for slot in SLOTS}, counts


def value_of(moment):
    return moment.dequantize() if hasattr(moment, 'codes') else moment


def is_coded(size):
    return size >= LEAST and size % BLOCK == 0


@pytest.mark.parametrize('bounds', [(0, 4096, 8192), (0, 4101, 8197, 8200), (0, 100)])
def test_the_same_parts_are_the_same_bits(bounds):
    entries, _ = save(moments_of(bounds[-1]), bounds)
    assert has_parts(entries)
    for start, stop in itertools.pairwise(bounds):
        moments, counts = load(entries, start, stop)
        assert counts == (2, 0)
        for slot, moment in moments.items():
            for entry, pieces in entries_of(slot, moment, start).items():
                assert torch.equal(pieces.tensors[0], entries[entry]), entry


def test_rounding_values_of_codes_anew_changes_them():
    """A block whose largest number is negative has no code for it: this is why blocks are kept where they can be."""
    parameter, optimizer = optimizer_of(LEAST)
    moment = optimizer.empty_moment(parameter, 'exp_avg')
    moment.copy_(-torch.ones(LEAST))
    again = optimizer.empty_moment(parameter, 'exp_avg')
    again.copy_(value_of(moment))
    assert not torch.equal(again.scale, moment.scale)


@settings(max_examples=60)
@given(st.data())
def test_any_parts(data):
    """What is not rounded anew keeps its value, and what is, is at most half a step away."""
    sizes = st.lists(st.sampled_from([4096, 4352, 8192, 300, 4100, 512]), min_size=1, max_size=4)
    bounds = [0]
    for size in data.draw(sizes, 'saved parts'):
        bounds.append(bounds[-1] + size)
    whole = bounds[-1]
    cuts = st.integers(0, whole) | st.integers(0, whole // BLOCK).map(lambda block: block * BLOCK)
    start, stop = sorted((data.draw(cuts, 'start'), data.draw(cuts, 'stop')))
    if start == stop:
        start, stop = 0, whole
    entries, saved = save(moments_of(whole), bounds)
    moments, (number, changed) = load(entries, start, stop)
    assert number == 2
    kept = 0
    for slot, moment in moments.items():
        assert hasattr(moment, 'codes') == is_coded(stop - start)
        found, expected = value_of(moment), saved[slot][start:stop]
        kept += torch.equal(found, expected)
        if hasattr(moment, 'codes'):
            largest = expected.view(-1, BLOCK).abs().amax(1, keepdim=True)
            assert ((found - expected).view(-1, BLOCK).abs() <= HALF_STEP * largest).all()
    assert kept == 2 - changed
    is_aligned = all(
        (first - start) % BLOCK == 0 and is_coded(last - first)
        for first, last in itertools.pairwise(bounds)
        if max(first, start) < min(last, stop)
    )
    if is_aligned or not is_coded(stop - start):
        assert changed == 0


def test_blocks_of_another_size():
    entries, saved = save(moments_of(LEAST), (0, LEAST), block_size=128)
    moments, counts = load(entries, 0, LEAST)
    assert counts == (2, 2)
    for slot, moment in moments.items():
        assert moment.block_size == BLOCK
        largest = saved[slot].view(-1, BLOCK).abs().amax(1, keepdim=True)
        assert ((value_of(moment) - saved[slot]).view(-1, BLOCK).abs() <= HALF_STEP * largest).all()


def test_a_part_that_was_not_saved():
    entries, _ = save(moments_of(8192), (0, 4096, 8192))
    del entries['exp_avg_sq.codes[4096]'], entries['exp_avg_sq.scale[4096]']
    with pytest.raises(ValueError, match=r'^exp_avg_sq: 4096 of 8192 elements from 0 on are there'):
        load(entries, 0, 8192)
