"""Functions in several processes: results, failures, hangs, and torch after a fork."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lakonlab.ranks import Ranks
from tests.processes import ProcessesHangError, ProcessFailedError, ProcessPool, run_processes


@pytest.fixture(scope='module')
def pool() -> Iterator[ProcessPool]:
    with ProcessPool(2) as pool:
        yield pool


def describe(ranks: Ranks, value: int, *, factor: int = 1) -> tuple[int, int, str, int]:
    return ranks.rank, ranks.world_size, dist.get_backend(), value * factor


def everybody(ranks: Ranks) -> list[int]:
    return ranks.all_gather(os.getpid())


def add(ranks: Ranks, value: Tensor) -> Tensor:
    total = value * (ranks.rank + 1)
    dist.all_reduce(total)
    return total


def draw(ranks: Ranks) -> Tensor:
    return torch.randn(3)


def fail_on_second(ranks: Ranks) -> None:
    os.write(1, f'seen by {ranks.rank}\n'.encode())
    if ranks.rank == 1:
        raise ValueError('no such thing')
    dist.barrier()


def die_on_second(ranks: Ranks) -> None:
    if ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def hang_on_first(ranks: Ranks) -> None:
    if ranks.rank == 0:
        time.sleep(600)
    dist.barrier()


def start_sleeper(ranks: Ranks) -> int:
    return os.spawnlp(os.P_NOWAIT, 'sleep', 'sleep', '600')


def build_linear() -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(6, 4)


def sharded_gradients(ranks: Ranks, data: Tensor) -> tuple[tuple[int, ...], Tensor]:
    from torch.distributed.fsdp import fully_shard

    linear = fully_shard(build_linear())
    linear(data.chunk(ranks.world_size)[ranks.rank]).square().mean().backward()
    return tuple(linear.weight.to_local().shape), linear.weight.grad.full_tensor()


def is_running(pid: int) -> bool:
    # A process that nobody has waited for yet is still listed, as a zombie.
    try:
        return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
    except FileNotFoundError:
        return False


def test_results_come_by_rank():
    assert run_processes(describe, 2, 5, factor=3) == [(0, 2, 'gloo', 15), (1, 2, 'gloo', 15)]


def test_one_process_is_another_process():
    assert run_processes(describe, 1, 5) == [(0, 1, 'gloo', 5)]
    [pids] = run_processes(everybody, 1)
    assert pids != [os.getpid()]


def test_collective(pool):
    for total in pool.run(add, torch.tensor([1.0, 2.0])):
        assert total.tolist() == [3.0, 6.0]


def test_random_state_is_the_same_in_every_process_and_call(pool):
    first, second = pool.run(draw)
    assert torch.equal(first, second)
    assert torch.equal(first, pool.run(draw)[0])


def test_fsdp2_after_the_fork(pool):
    data = torch.randn(8, 6)
    linear = build_linear()
    linear(data).square().mean().backward()
    for shape, gradient in pool.run(sharded_gradients, data):
        assert shape == (2, 6)
        torch.testing.assert_close(gradient, linear.weight.grad)


def test_failure_names_rank_and_line_and_shows_output(pool):
    with pytest.raises(ProcessFailedError, match='no such thing') as caught:
        pool.run(fail_on_second)
    assert caught.value.rank == 1
    message = str(caught.value)
    assert 'in fail_on_second' in message
    assert 'seen by 0' in message
    assert 'seen by 1' in message


def test_processes_are_new_after_a_failure(pool):
    before = pool.run(everybody)[0]
    with pytest.raises(ProcessFailedError, match='exit code -9') as caught:
        pool.run(die_on_second)
    assert caught.value.rank == 1
    assert not any(is_running(pid) for pid in before)
    assert not set(pool.run(everybody)[0]) & set(before)


def test_hang_shows_the_stacks_of_all_processes(pool):
    before = pool.run(everybody)[0]
    start = time.monotonic()
    with pytest.raises(ProcessesHangError, match='no answer within 3 s') as caught:
        pool.run(hang_on_first, timeout=3)
    assert time.monotonic() - start < 8
    first, second = str(caught.value).split('--- stacks of rank 1 ---')
    assert 'in hang_on_first' in first
    assert 'in hang_on_first' in second
    assert 'in barrier' in second
    assert not any(is_running(pid) for pid in before)


def test_nothing_is_left_running():
    with ProcessPool(2) as pool:
        started = pool.pids + pool.run(start_sleeper)
        assert all(is_running(pid) for pid in started)
    deadline = time.monotonic() + 5
    while any(is_running(pid) for pid in started) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(is_running(pid) for pid in started)


def test_calls_in_a_pool_are_cheap(pool):
    pool.run(everybody)
    start = time.monotonic()
    for number in range(20):
        assert pool.run(describe, number)[1][-1] == number
    assert time.monotonic() - start < 3
