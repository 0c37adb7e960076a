"""Watchdogs: what they report, whom they ask, and when they keep quiet."""

import logging
import threading
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from lakonlab.phases import PhaseClock, phase
from lakonlab.ranks import Ranks
from lakonlab.runner.log import attach_log_handlers
from lakonlab.runner.watchdog import HUNG_EXIT_CODE, Watchdog, open_store
from tests.processes import ProcessFailedError, run_processes

POLL = 0.02


class Recording(Watchdog):
    """Remembers that it would have ended the process."""

    def __init__(self, rank, world_size, folder, limit=0.2, iteration=7, **options):
        clock = PhaseClock(torch.device('cpu'))
        ranks = Ranks(rank, world_size, rank, world_size)
        options = dict(poll_seconds=POLL, answer_seconds=0.3, **options)
        super().__init__(ranks, clock, limit, folder, iteration=lambda: iteration, **options)
        self.left = threading.Event()

    def _leave(self):
        self.left.set()


def stand_still(event):
    event.wait(10)


def test_names_phase_iteration_and_rank_and_writes_stacks(tmp_path, caplog):
    watchdog = Recording(0, 1, tmp_path)
    with watchdog.clock.active(), phase('teacher'), watchdog, caplog.at_level(logging.ERROR):
        stand_still(watchdog.left)
    assert watchdog.left.is_set()
    message = caplog.records[0].getMessage()
    assert "phase 'teacher' of iteration 7" in message
    assert 'rank 0 of 1' in message
    assert 'runner.watchdog_seconds=0.2' in message
    assert str(tmp_path / 'stacks_rank0.txt') in message
    stacks = (tmp_path / 'stacks_rank0.txt').read_text()
    assert 'in stand_still' in stacks  # the main thread, not only the one that writes
    assert "phase 'teacher'" in stacks


def test_beats_keep_it_quiet_and_the_limit_is_for_the_time_without(tmp_path):
    watchdog = Recording(0, 1, tmp_path, limit=0.3)
    with watchdog:
        for _ in range(10):
            assert not watchdog.left.wait(0.06)
            watchdog.clock.beat()
        start = time.monotonic()
        assert watchdog.left.wait(5)
    assert time.monotonic() - start > 0.25


@pytest.mark.parametrize('limit', [0, 0.2])
def test_does_nothing_without_a_limit_or_when_closed(tmp_path, limit):
    watchdog = Recording(0, 1, tmp_path, limit=limit)
    with watchdog:
        if limit == 0:
            time.sleep(0.1)
    assert not watchdog.left.wait(0.4)
    assert not any(thread.name == 'watchdog' for thread in threading.enumerate())
    assert list(tmp_path.iterdir()) == []


def test_negative_limit(tmp_path):
    with pytest.raises(ValueError, match=r'runner.watchdog_seconds=-1'):
        Recording(0, 1, tmp_path, limit=-1)


def test_suspended_time_does_not_count(tmp_path, monkeypatch):
    """A process that was stopped for an hour has made no progress in it, and does not hang."""
    watchdog = Recording(0, 1, tmp_path, limit=0.5)
    offset = 0.0
    monotonic = time.monotonic
    clock = SimpleNamespace(monotonic=lambda: monotonic() + offset, sleep=time.sleep)
    monkeypatch.setattr('lakonlab.runner.watchdog.time', clock)
    with watchdog:
        time.sleep(0.1)
        offset = 3600.0
        assert not watchdog.left.wait(0.2)


def test_where_nothing_can_be_written_it_still_ends(tmp_path, caplog, capfd):
    watchdog = Recording(0, 1, tmp_path / 'missing')
    with watchdog, caplog.at_level(logging.ERROR):
        stand_still(watchdog.left)
    assert watchdog.left.is_set()
    assert 'standard error' in caplog.records[0].getMessage()
    assert 'in stand_still' in capfd.readouterr().err


def test_processes_ask_each_other(tmp_path, caplog):
    """Both end, each with stacks of its own, and one report says what both were doing."""
    store = dist.HashStore()
    first = Recording(0, 2, tmp_path, store=store, limit=0.3)
    second = Recording(1, 2, tmp_path, store=store, limit=1000, iteration=8)
    second.clock.switch('data')
    with caplog.at_level(logging.ERROR), first, second:
        assert first.left.wait(5)
        assert second.left.wait(5)
    messages = [record.getMessage() for record in caplog.records]
    assert any(line.startswith('rank 1 of 2') and 'rank 0 hangs' in line for line in messages)
    (summary,) = [line for line in messages if 'the run hangs' in line]
    assert "rank 0: 0 s without progress in phase 'other' of iteration 7" in summary
    assert "rank 1: 0 s without progress in phase 'data' of iteration 8" in summary
    for rank in range(2):
        assert str(tmp_path / f'stacks_rank{rank}.txt') in summary
        assert 'Thread' in (tmp_path / f'stacks_rank{rank}.txt').read_text()


def test_whoever_does_not_answer_is_named_within_the_bound(tmp_path, caplog):
    watchdog = Recording(0, 2, tmp_path, store=dist.HashStore())
    with caplog.at_level(logging.ERROR), watchdog:
        assert watchdog.left.wait(5)
    assert 'rank 1: did not answer within 0.3 s' in caplog.text


def test_waiting_for_a_process_that_moves_is_no_hang(tmp_path):
    store = dist.HashStore()
    waiting, busy = (Recording(rank, 2, tmp_path, store=store, limit=0.4) for rank in range(2))
    with waiting, busy:
        for _ in range(20):
            busy.clock.beat()
            assert not waiting.left.wait(0.04)
        assert waiting.left.wait(5)


class DeadStore:
    """Keeps callers waiting, or fails."""

    def __init__(self, fails):
        self.released = threading.Event()
        if fails:
            self.released.set()

    def add(self, key, amount):
        self.released.wait(10)
        raise dist.DistNetworkError('connection reset by peer')


@pytest.mark.parametrize('fails', [True, False])
def test_a_dead_store_does_not_keep_it_from_ending(tmp_path, caplog, fails):
    watchdog = Recording(1, 2, tmp_path, store=DeadStore(fails))
    with watchdog, caplog.at_level(logging.ERROR):
        assert watchdog.left.wait(5)
        watchdog.store.released.set()
    assert (tmp_path / 'stacks_rank1.txt').exists()
    assert 'rank 0, which carries the store' in caplog.text


def hang_in_a_collective(ranks, folder):
    """Rank 0 waits in an all-reduce that rank 1 does not join."""
    handlers = attach_log_handlers(folder / 'run.log', rank=ranks.rank)
    clock = PhaseClock(torch.device('cpu'))
    store = open_store(ranks)
    options = dict(iteration=lambda: 41 + ranks.rank, store=store, poll_seconds=0.05)
    with clock.active(), Watchdog(ranks, clock, 0.5, folder, **options):
        if ranks.rank == 0:
            with phase('student'):
                dist.all_reduce(torch.ones(1))
        else:
            with phase('data'):
                wait_for_data()
    return handlers


def wait_for_data():
    time.sleep(60)


def test_processes_that_hang_in_a_collective_end(tmp_path):
    with pytest.raises(ProcessFailedError, match=rf'exit code {HUNG_EXIT_CODE}'):
        run_processes(hang_in_a_collective, 2, tmp_path, timeout=30)
    log = (tmp_path / 'run.log').read_text()
    assert log.count('the run hangs') == 1
    assert "phase 'student' of iteration 41" in log
    assert "phase 'data' of iteration 42" in log  # told by the other process
    assert 'all_reduce' in (tmp_path / 'stacks_rank0.txt').read_text()
    assert 'in wait_for_data' in (tmp_path / 'stacks_rank1.txt').read_text()
