"""Named random draws: reproducible, independent of how a batch is split, and of the right distribution."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lakonlab.ops.random_source import PerRowSource, RecordedSource, SeededSource, TorchSource


@settings(max_examples=50)
@given(
    seed=st.integers(0, 2**32),
    step=st.integers(0, 2**40),
    batch=st.integers(1, 9),
    size=st.integers(1, 11),
    kind=st.sampled_from(['uniform', 'normal']),
    data=st.data(),
)
def test_a_row_does_not_depend_on_the_rest_of_the_batch(seed, step, batch, size, kind, data):
    start = data.draw(st.integers(0, batch - 1))
    count = data.draw(st.integers(1, batch - start))
    whole = getattr(SeededSource(seed, step), kind)('noise', (batch, size))
    part = getattr(SeededSource(seed, step).rows(start, count), kind)('noise', (count, size))
    assert torch.equal(part, whole[start : start + count])
    order = data.draw(st.permutations(range(batch)))
    shuffled = getattr(SeededSource(seed, step, row_ids=order), kind)('noise', (batch, size))
    assert torch.equal(shuffled, whole[list(order)])


def test_draws_differ_by_seed_step_name_and_occasion():
    def draw(seed=0, step=0, name='noise', skip=0):
        source = SeededSource(seed, step)
        for _ in range(skip):
            source.normal(name, (4,))
        return source.normal(name, (4,))

    reference = draw()
    assert torch.equal(draw(), reference)
    for other in (draw(seed=1), draw(step=1), draw(name='other'), draw(skip=1)):
        assert not torch.equal(other, reference)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_distributions(dtype):
    source = SeededSource(11)
    uniform = source.uniform('u', (500, 400), dtype)
    normal = source.normal('n', (500, 400), dtype)
    assert uniform.dtype == normal.dtype == dtype
    assert uniform.min() >= 0
    assert uniform.max() < 1
    assert stats.kstest(uniform.flatten().numpy(), 'uniform').pvalue > 1e-3
    assert stats.kstest(normal.flatten().numpy(), 'norm').pvalue > 1e-3
    rows = normal.double()
    assert (rows @ rows.T / rows.shape[1] - torch.eye(500)).abs().max() < 6 / math.sqrt(400)


def test_torch_source_follows_its_generator():
    first, second = (TorchSource(torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first.normal('a', (2, 3)), second.normal('b', (2, 3)))
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    assert torch.equal(TorchSource().uniform('raw_t', (4,)), expected)


def test_recorded_source_says_what_is_missing():
    source = RecordedSource({'noise': [torch.zeros(2, 3)]})
    with pytest.raises(ValueError, match='noise'):
        source.normal('noise', (5,))
    with pytest.raises(KeyError, match='raw_t'):
        source.uniform('raw_t', (2,))


def test_wrong_number_of_rows_is_refused():
    with pytest.raises(ValueError, match='row_ids'):
        SeededSource(0, row_ids=[1, 2]).normal('noise', (3, 4))


def test_a_generator_per_row():
    def source(*seeds):
        return PerRowSource([torch.Generator().manual_seed(seed) for seed in seeds])

    both = source(1, 2)
    first = both.normal('noise', (2, 3)), both.uniform('raw_t', (2,))
    parts = [source(1), source(1, 2).rows(1, 1)]
    for index, part in enumerate(parts):
        assert torch.equal(part.normal('noise', (1, 3)), first[0][index : index + 1])
        assert torch.equal(part.uniform('raw_t', (1,)), first[1][index : index + 1])
    with pytest.raises(ValueError, match='3 rows are drawn, but there are 2 generators'):
        both.normal('noise', (3,))
