"""The data order: who is read when, what a batch has in common, and that nothing has to be replayed."""

import itertools
import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lakonlab.datasets.order import DataOrder, data_order, members, permutation

BUCKETS = st.lists(st.sampled_from('abcd'), min_size=1, max_size=40)
BATCH = st.integers(1, 9)
SEED = st.integers(0, 9)


@given(st.integers(1, 200), st.integers(0, 2**40), st.integers(0, 1000), st.sampled_from(['', 'x']))
def test_permutation_is_one_and_is_reproducible(size, seed, epoch, stream):
    order = permutation(size, seed, epoch, stream)
    assert sorted(order.tolist()) == list(range(size))
    assert (order == permutation(size, seed, epoch, stream)).all()


def test_permutation_is_fixed_forever():
    assert permutation(8, seed=0, epoch=0).tolist() == [7, 2, 4, 1, 0, 3, 6, 5]


def test_bucketed_order_is_fixed_forever():
    order = DataOrder(7, 3, seed=5, bucket_ids=[9, 9, 4, 9, 4, 9, 9])
    assert [order.reads(iteration).items.tolist() for iteration in range(4)] == [
        [5, 6, 0],
        [2, 4, 4],
        [3, 1, 1],
        [2, 2, 4],
    ]


def test_epochs_seeds_and_streams_differ():
    orders = {
        tuple(permutation(50, seed, epoch, stream).tolist())
        for seed in range(4)
        for epoch in range(4)
        for stream in ('', 'bucket 1')
    }
    assert len(orders) == 32


def iterations_of(size, batch, bucket_ids, epochs):
    """How many iterations the first epochs have, counted in fractions."""
    sizes = Counter(bucket_ids).values() if bucket_ids else [size]
    return sum(math.ceil(Fraction(epochs * n, batch)) for n in sizes)


def read(order, iterations):
    return [order.reads(iteration).items.tolist() for iteration in iterations]


@given(bucket_ids=BUCKETS, batch=BATCH, seed=SEED, shuffle=st.booleans(), epochs=st.integers(1, 4))
def test_every_epoch_reads_every_item_and_no_item_gets_ahead(bucket_ids, batch, seed, shuffle, epochs):
    order = DataOrder(len(bucket_ids), batch, seed=seed, shuffle=shuffle, bucket_ids=bucket_ids)
    iterations = iterations_of(len(bucket_ids), batch, bucket_ids, epochs)
    counts = Counter(item for items in read(order, range(iterations)) for item in items)
    for bucket in set(bucket_ids):
        of_bucket = [counts[item] for item, name in enumerate(bucket_ids) if name == bucket]
        assert min(of_bucket) >= epochs
        assert max(of_bucket) - min(of_bucket) <= 1
        assert sum(of_bucket) - epochs * len(of_bucket) < batch


@given(bucket_ids=BUCKETS, batch=BATCH, seed=SEED, shuffle=st.booleans())
def test_a_batch_is_full_and_of_one_bucket(bucket_ids, batch, seed, shuffle):
    order = DataOrder(len(bucket_ids), batch, seed=seed, shuffle=shuffle, bucket_ids=bucket_ids)
    sizes = Counter(bucket_ids)
    for items in read(order, range(30)):
        assert len(items) == batch
        (bucket,) = {bucket_ids[item] for item in items}
        # a batch that straddles two passes may meet an item in both
        assert max(Counter(items).values()) <= 1 + math.ceil(batch / sizes[bucket])


@given(bucket_ids=BUCKETS, batch=BATCH, seed=SEED)
def test_passes_count_the_readings_of_an_item(bucket_ids, batch, seed):
    order = DataOrder(len(bucket_ids), batch, seed=seed, bucket_ids=bucket_ids)
    readings = {}
    for iteration in range(40):
        reads = order.reads(iteration)
        for item, number in zip(reads.items.tolist(), reads.passes.tolist()):
            readings.setdefault(item, []).append(number)
    for numbers in readings.values():
        assert sorted(numbers) == list(range(len(numbers)))


@given(bucket_ids=BUCKETS, batch=BATCH, iterations=st.lists(st.integers(0, 10**6), min_size=1, max_size=6))
def test_any_iteration_can_be_asked_for_first(bucket_ids, batch, iterations):
    used = DataOrder(len(bucket_ids), batch, seed=3, bucket_ids=bucket_ids)
    for iteration in iterations:
        new = DataOrder(len(bucket_ids), batch, seed=3, bucket_ids=bucket_ids)
        for found, expected in zip(used.reads(iteration), new.reads(iteration), strict=True):
            assert found.tolist() == expected.tolist()


@given(bucket_ids=BUCKETS, batch=BATCH, seed=SEED)
def test_epochs_by_counting(bucket_ids, batch, seed):
    order = DataOrder(len(bucket_ids), batch, seed=seed, bucket_ids=bucket_ids)
    starts = [iterations_of(len(bucket_ids), batch, bucket_ids, epoch) for epoch in range(60)]
    for iteration in range(starts[-1]):
        epoch = order.epoch(iteration)
        assert starts[epoch] <= iteration < starts[epoch + 1]


@given(size=st.integers(1, 40), batch=BATCH, iteration=st.integers(0, 10**12))
def test_epoch_of_one_bucket_is_that_of_the_first_position(size, batch, iteration):
    assert DataOrder(size, batch).epoch(iteration) == iteration * batch // size


@given(size=st.integers(1, 40), batch=BATCH, seed=SEED, iteration=st.integers(0, 1000), shuffle=st.booleans())
def test_one_bucket_is_no_bucket(size, batch, seed, iteration, shuffle):
    plain = DataOrder(size, batch, seed=seed, shuffle=shuffle)
    bucketed = DataOrder(size, batch, seed=seed, shuffle=shuffle, bucket_ids=[7] * size)
    assert bucketed.reads(iteration).items.tolist() == plain.reads(iteration).items.tolist()
    assert bucketed.buckets == plain.buckets == 'one'
    # what the positions of a stream of permutations are, written out
    positions = range(iteration * batch, (iteration + 1) * batch)
    expected = [
        permutation(size, seed, position // size)[position % size] if shuffle else position % size
        for position in positions
    ]
    assert plain.reads(iteration).items.tolist() == expected


@settings(max_examples=50)
@given(bucket_ids=BUCKETS, batch=BATCH, seed=SEED)
def test_unshuffled_batches_follow_the_data_set(bucket_ids, batch, seed):
    order = DataOrder(len(bucket_ids), batch, seed=seed, shuffle=False, bucket_ids=bucket_ids)
    first_epoch = read(order, range(iterations_of(len(bucket_ids), batch, bucket_ids, 1)))
    assert [items[0] for items in first_epoch] == sorted(items[0] for items in first_epoch)
    for bucket in set(bucket_ids):
        expected = [item for item, name in enumerate(bucket_ids) if name == bucket]
        found = [item for items in first_epoch if bucket_ids[items[0]] == bucket for item in items]
        assert found[: len(expected)] == expected


def test_shuffling_mixes_buckets():
    order = DataOrder(400, 4, seed=1, bucket_ids=[0] * 200 + [1] * 200)
    buckets = [int(order.reads(iteration).items[0] >= 200) for iteration in range(100)]
    assert sum(buckets) == 50
    changes = sum(a != b for a, b in itertools.pairwise(buckets))
    assert 30 <= changes <= 70  # 49.5 expected, standard deviation 5


def test_lookup_does_not_depend_on_the_iteration(monkeypatch):
    calls = []
    monkeypatch.setattr(
        'lakonlab.datasets.order.permutation', lambda *arguments: calls.append(arguments) or permutation(*arguments)
    )
    order = DataOrder(1000, 8, seed=1, bucket_ids=np.arange(1000) % 3)
    order.reads(10**12)
    assert len(calls) <= 3  # the batches of the epoch, and one or two passes through the bucket


@pytest.mark.parametrize(
    'ids', [[0, 0, 1], ['a', 'a', 'b'], np.array([5, 5, 9], dtype=np.uint8), torch.tensor([1, 1, 2])]
)
def test_kinds_of_ids(ids):
    assert [items.tolist() for items in members(ids, 3)] == [[0, 1], [2]]


@pytest.mark.parametrize('ids', [[0, 1], [0, None, 1], [0.5, 1.0, 1.0], [[0], [1], [2]]])
def test_bad_ids_are_refused(ids):
    with pytest.raises(ValueError, match='bucket_ids of the data set: expected one number or name for each of 3'):
        DataOrder(3, 2, bucket_ids=ids)


def test_bad_arguments():
    with pytest.raises(ValueError, match='empty'):
        DataOrder(0, 4)
    with pytest.raises(ValueError, match='global batch is 0'):
        DataOrder(4, 0)


def test_digest_tells_buckets_apart():
    def digest(ids):
        return DataOrder(4, 2, bucket_ids=ids).buckets

    assert digest([0, 0, 1, 1]) == digest(['x', 'x', 'y', 'y'])
    assert len({digest(ids) for ids in ([0, 0, 1, 1], [0, 1, 0, 1], [0, 0, 0, 1], [0, 1, 1, 1], [0] * 4)}) == 5


class Draws(torch.utils.data.Dataset):
    independent_items = True

    def __len__(self):
        return 10**12


def test_independent_draws_are_read_in_order():
    assert data_order(Draws(), 4, shuffle=True).reads(5).items.tolist() == [20, 21, 22, 23]
