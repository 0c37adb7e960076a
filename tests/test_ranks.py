"""Errors on their way from one process to the others."""

import logging
import threading

import pytest

from lakonlab.ranks import Ranks, is_reported_by_main, portable
from tests.evaluation.thread_ranks import run_threads


class TwoArgumentsError(Exception):
    """Pickled with one argument, of which no error can be made again."""

    def __init__(self, what, where):
        super().__init__(f'{what} in {where}')


def error_with(content):
    error = OSError('the disk is full')
    error.content = content
    return error


@pytest.mark.parametrize('error', [TwoArgumentsError('a hole', 'the road'), error_with(threading.Lock())])
@pytest.mark.parametrize('where', ['together', 'on_main'])
def test_an_error_that_cannot_travel_says_the_same(error, where):
    def fail():
        raise error

    def call(ranks):
        if where == 'on_main':
            return ranks.on_main(fail)
        return ranks.together(fail if ranks.rank == 0 else lambda: None)

    first, second = run_threads(call, 2)
    assert str(error) in str(first)
    assert str(error) in str(second)
    assert isinstance(second, RuntimeError)
    assert is_reported_by_main(second)


def test_an_error_that_can_travel_is_left_alone():
    error = OSError(28, 'the disk is full')
    assert portable(error) is error


class NobodyAnswers(Ranks):
    """One of several processes, whose exchanges never end."""

    def all_gather(self, value):
        raise AssertionError('this process waits for ever')


def test_who_fails_in_an_exchange_waits_for_nobody(caplog):
    def fail():
        raise MemoryError('out of memory')

    ranks = NobodyAnswers(rank=1, world_size=2)
    with pytest.raises(AssertionError, match='waits for ever'):
        ranks.together(fail)
    with caplog.at_level(logging.ERROR), pytest.raises(MemoryError, match='out of memory'):
        ranks.together(fail, exchanges=True)
    assert 'process 1 of 2 has failed' in caplog.text
    assert 'out of memory' in caplog.text
