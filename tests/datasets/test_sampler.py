import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lakonlab.datasets.sampler import EvaluationBatchSampler, StreamBatchSampler, permutation


@given(st.integers(1, 200), st.integers(0, 2**40), st.integers(0, 1000))
def test_permutation_is_one_and_is_reproducible(size, seed, epoch):
    order = permutation(size, seed, epoch)
    assert sorted(order.tolist()) == list(range(size))
    assert (order == permutation(size, seed, epoch)).all()


def test_permutation_is_fixed_forever():
    assert permutation(8, seed=0, epoch=0).tolist() == [7, 2, 4, 1, 0, 3, 6, 5]


def test_epochs_and_seeds_differ():
    orders = {tuple(permutation(50, seed, epoch).tolist()) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


@given(size=st.integers(1, 40), batch=st.integers(1, 9), world_size=st.integers(1, 4), seed=st.integers(0, 9))
def test_every_epoch_covers_every_item_once(size, batch, world_size, seed):
    samplers = [
        StreamBatchSampler(size, batch, seed=seed, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    iterations = -(-3 * size // (batch * world_size))
    stream = [index for i in range(iterations) for sampler in samplers for index in sampler.batch(i)]
    for epoch in range(3):
        assert sorted(stream[epoch * size : (epoch + 1) * size]) == list(range(size))


@given(size=st.integers(1, 40), batch=st.integers(1, 9), world_size=st.integers(1, 3), start=st.integers(0, 10**9))
def test_resumed_stream_is_the_same_stream(size, batch, world_size, start):
    arguments = dict(seed=5, rank=world_size - 1, world_size=world_size)
    resumed = itertools.islice(StreamBatchSampler(size, batch, start_iter=start, **arguments), 5)
    reference = StreamBatchSampler(size, batch, **arguments)
    assert list(resumed) == [reference.batch(start + i) for i in range(5)]


@settings(max_examples=50)
@given(size=st.integers(1, 40), batch=st.integers(1, 4), iteration=st.integers(0, 50))
def test_global_batch_does_not_depend_on_the_number_of_ranks(size, batch, iteration):
    whole = StreamBatchSampler(size, 6 * batch, seed=1).batch(iteration)
    for world_size in (2, 3):
        parts = [
            StreamBatchSampler(size, 6 * batch // world_size, seed=1, rank=rank, world_size=world_size).batch(iteration)
            for rank in range(world_size)
        ]
        assert list(itertools.chain(*parts)) == whole


def test_epoch_of_an_iteration():
    sampler = StreamBatchSampler(10, 4)
    assert [sampler.epoch(i) for i in range(6)] == [0, 0, 0, 1, 1, 2]


def test_unshuffled_stream_keeps_the_order():
    assert StreamBatchSampler(5, 4, shuffle=False).batch(1) == [4, 0, 1, 2]


@given(size=st.integers(0, 50), batch=st.integers(1, 9), world_size=st.integers(1, 4))
def test_evaluation_reads_every_item_once(size, batch, world_size):
    samplers = [EvaluationBatchSampler(size, batch, rank=rank, world_size=world_size) for rank in range(world_size)]
    read = [index for sampler in samplers for indices in sampler for index in indices]
    assert sorted(read) == list(range(size))
    assert all(len(list(sampler)) == len(sampler) for sampler in samplers)


def test_bad_arguments():
    with pytest.raises(ValueError, match='empty'):
        StreamBatchSampler(0, 4)
    with pytest.raises(ValueError, match='samples_per_gpu=0'):
        StreamBatchSampler(4, 0)
    with pytest.raises(ValueError, match='samples_per_gpu=0'):
        EvaluationBatchSampler(4, 0)
