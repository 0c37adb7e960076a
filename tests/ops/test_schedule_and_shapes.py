"""Time shift, rollout schedules and batch helpers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lakonlab.ops.rollout_schedule import rollout_schedule
from lakonlab.ops.shapes import batch_size_of, concatenate_rows, select_rows
from lakonlab.ops.time_shift import dynamic_shift, stretch_to_terminal, unwarp, warp

unit = st.floats(0, 1)


@given(raw=unit, shift=st.floats(0.1, 20))
def test_warp_is_a_bijection_of_the_unit_interval(raw, shift):
    sigma = warp(torch.tensor(raw, dtype=torch.float64), shift)
    assert 0 <= sigma <= 1
    assert float(unwarp(sigma, shift)) == pytest.approx(raw, abs=1e-12)


@given(
    starts=st.lists(unit, min_size=1, max_size=5),
    shares=st.lists(unit, min_size=5, max_size=5),
    total=st.integers(1, 200),
    shift=st.floats(0.5, 6),
    rounding=st.sampled_from(['round', 'ceil']),
)
def test_rollout_schedule(starts, shares, total, shift, rounding):
    start = torch.tensor(starts, dtype=torch.float64)
    end = start * torch.tensor(shares[: len(starts)], dtype=torch.float64)
    schedule = rollout_schedule(start, end, total, shift, rounding)
    assert schedule.sigmas.shape == (len(starts), max(1, int(schedule.counts.max())) + 1)
    torch.testing.assert_close(schedule.sigmas[:, 0], warp(start, shift))
    torch.testing.assert_close(schedule.sigmas[:, -1], warp(end, shift))
    assert (schedule.sigmas.diff(dim=1) <= 1e-15).all()
    for row, count in zip(schedule.sigmas, schedule.counts.tolist()):
        used = max(count, 1)
        steps = unwarp(row, shift).diff()[:used]
        assert float(steps.max() - steps.min()) < 1e-12  # equal steps in schedule time
        assert torch.equal(row[used:], row[used].expand(len(row) - used))


def test_counts_round_half_to_even_or_up():
    start, end = torch.tensor([5 / 64, 7 / 64]), torch.zeros(2)
    assert rollout_schedule(start, end, 32, 1.0).counts.tolist() == [2, 4]
    assert rollout_schedule(start, end, 32, 1.0, 'ceil').counts.tolist() == [3, 4]
    with pytest.raises(ValueError, match='floor'):
        rollout_schedule(start, end, 32, 1.0, 'floor')


def test_dynamic_shift_hits_both_ends():
    for kind in ('exp', 'sqrt'):
        assert dynamic_shift(256, kind=kind) == pytest.approx(math.exp(0.5))
        assert dynamic_shift(4096, kind=kind) == pytest.approx(math.exp(1.15))
    with pytest.raises(ValueError, match='linear'):
        dynamic_shift(256, kind='linear')


def test_stretched_grid_ends_where_it_should():
    sigmas = stretch_to_terminal(torch.linspace(1, 0.2, 5), 0.05)
    assert float(sigmas[0]) == 1
    assert float(sigmas[-1]) == pytest.approx(0.05)


def test_rows_of_nested_batches():
    data = {'a': torch.arange(4), 'nested': {'names': ['w', 'x', 'y', 'z']}, 'scale': 2.0}
    part = select_rows(data, slice(1, 3))
    assert part['a'].tolist() == [1, 2]
    assert part['nested'] == {'names': ['x', 'y']}
    assert part['scale'] == 2.0
    picked = select_rows(data, torch.tensor([3, 0]))
    assert picked['a'].tolist() == [3, 0]
    assert picked['nested'] == {'names': ['z', 'w']}
    joined = concatenate_rows(part, picked)
    assert joined['a'].tolist() == [1, 2, 3, 0]
    assert joined['nested'] == {'names': ['x', 'y', 'z', 'w']}
    assert batch_size_of({'x': {'scale': 1.0}, 'y': data}) == 4
    with pytest.raises(ValueError, match='neither a tensor nor a list'):
        batch_size_of({'scale': 1.0})
