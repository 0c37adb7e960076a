import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lakonlab.datasets.order import DataOrder
from lakonlab.datasets.sampler import EvaluationBatchSampler, StreamBatchSampler

BUCKETS = st.none() | st.lists(st.integers(0, 3), min_size=40, max_size=40)


def order_of(size, batch, bucket_ids=None, seed=5):
    return DataOrder(size, batch, seed=seed, bucket_ids=None if bucket_ids is None else bucket_ids[:size])


@given(size=st.integers(1, 40), batch=st.integers(1, 9), world_size=st.integers(1, 4), seed=st.integers(0, 9))
def test_every_epoch_covers_every_item_once(size, batch, world_size, seed):
    samplers = [
        StreamBatchSampler(DataOrder(size, batch * world_size, seed=seed), rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    iterations = -(-3 * size // (batch * world_size))
    stream = [index for i in range(iterations) for sampler in samplers for index in sampler.batch(i)]
    for epoch in range(3):
        assert sorted(stream[epoch * size : (epoch + 1) * size]) == list(range(size))


@given(
    size=st.integers(1, 40),
    batch=st.integers(1, 9),
    world_size=st.integers(1, 3),
    start=st.integers(0, 10**9),
    buckets=BUCKETS,
)
def test_resumed_stream_is_the_same_stream(size, batch, world_size, start, buckets):
    def sampler(**arguments):
        order = order_of(size, batch * world_size, buckets)
        return StreamBatchSampler(order, rank=world_size - 1, world_size=world_size, **arguments)

    reference = sampler()
    assert list(itertools.islice(sampler(start_iter=start), 5)) == [reference.batch(start + i) for i in range(5)]


@settings(max_examples=50)
@given(size=st.integers(1, 40), batch=st.integers(1, 4), start=st.integers(0, 50), buckets=BUCKETS)
def test_run_goes_on_with_another_number_of_ranks(size, batch, start, buckets):
    whole = StreamBatchSampler(order_of(size, 6 * batch, buckets))
    for world_size in (2, 3):
        parts = [
            itertools.islice(
                StreamBatchSampler(
                    order_of(size, 6 * batch, buckets), start_iter=start, rank=rank, world_size=world_size
                ),
                4,
            )
            for rank in range(world_size)
        ]
        for iteration, of_ranks in enumerate(zip(*parts), start):
            assert list(itertools.chain(*of_ranks)) == whole.batch(iteration)


@given(batch=st.integers(1, 9), world_size=st.integers(1, 4), buckets=st.lists(st.integers(0, 3), min_size=1))
def test_all_ranks_read_one_bucket_in_one_step(batch, world_size, buckets):
    samplers = [
        StreamBatchSampler(order_of(len(buckets), batch * world_size, buckets), rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for batches in itertools.islice(zip(*samplers), 20):
        assert [len(items) for items in batches] == [batch] * world_size
        assert len({buckets[item] for items in batches for item in items}) == 1


def test_epoch_of_an_iteration():
    order = DataOrder(10, 4)
    assert [order.epoch(i) for i in range(6)] == [0, 0, 0, 1, 1, 2]


def test_unshuffled_stream_keeps_the_order():
    assert StreamBatchSampler(DataOrder(5, 4, shuffle=False)).batch(1) == [4, 0, 1, 2]


def test_items_with_their_passes():
    sampler = StreamBatchSampler(DataOrder(3, 4, shuffle=False), start_iter=1, with_passes=True)
    assert next(iter(sampler)) == [(1, 1), (2, 1), (0, 2), (1, 2)]


def evaluation(size, batch, world_size, buckets=None):
    return [
        EvaluationBatchSampler(
            size, batch, rank=rank, world_size=world_size, bucket_ids=None if buckets is None else buckets[:size]
        )
        for rank in range(world_size)
    ]


@given(size=st.integers(0, 40), batch=st.integers(1, 9), world_size=st.integers(1, 4), buckets=BUCKETS)
def test_evaluation_reads_every_item_once(size, batch, world_size, buckets):
    samplers = evaluation(size, batch, world_size, buckets)
    read = [index for sampler in samplers for indices in sampler for index in indices]
    assert sorted(read) == list(range(size))
    assert all(len(list(sampler)) == len(sampler) for sampler in samplers)
    assert all(indices for sampler in samplers for indices in sampler)


@given(size=st.integers(0, 40), batch=st.integers(1, 9), world_size=st.integers(1, 4))
def test_evaluation_without_buckets_deals_the_items_in_turn(size, batch, world_size):
    for rank, sampler in enumerate(evaluation(size, batch, world_size)):
        mine = list(range(rank, size, world_size))
        assert list(sampler) == [mine[start : start + batch] for start in range(0, len(mine), batch)]


@given(size=st.integers(0, 40), batch=st.integers(1, 9), world_size=st.integers(1, 4), buckets=BUCKETS)
def test_rounds_of_evaluation(size, batch, world_size, buckets):
    buckets = buckets or [0] * 40
    samplers = evaluation(size, batch, world_size, buckets)
    (one,) = evaluation(size, batch, 1, buckets)
    assert len({sampler.num_rounds for sampler in samplers}) == 1
    made = []
    for number in range(samplers[0].num_rounds):
        (bucket,) = {sampler.round(number).bucket for sampler in samplers}
        parts = [sampler.part(number) for sampler in samplers]
        items = sorted(itertools.chain(*parts))
        assert items == list(samplers[0].round(number).items)
        assert len({buckets[item] for item in items}) == 1
        # the main process has the most, as it is whose batch the others fill up theirs to
        assert max(map(len, parts)) == len(parts[0]) <= batch
        in_turn = [part[row] for row in range(len(parts[0])) for part in parts if row < len(part)]
        made += [(bucket, in_turn[start : start + batch]) for start in range(0, len(in_turn), batch)]
    assert made == [(one.round(number).bucket, one.part(number)) for number in range(one.num_rounds)]


def test_bad_arguments():
    with pytest.raises(ValueError, match='samples_per_gpu=0'):
        EvaluationBatchSampler(4, 0)
    with pytest.raises(ValueError, match='a global batch of 9 cannot be divided among 2 processes'):
        StreamBatchSampler(DataOrder(4, 9), world_size=2)
    with pytest.raises(ValueError, match='bucket_ids of the data set'):
        EvaluationBatchSampler(4, 1, bucket_ids=[1])
