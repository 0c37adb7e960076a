"""The writing thread."""

import threading

import pytest

from lakonlab.storage.background import BackgroundWriter


def fail():
    raise OSError('disk full')


def test_jobs_run_one_after_the_other():
    writer, order = BackgroundWriter(), []
    gate = threading.Event()
    writer.submit(lambda: (gate.wait(5), order.append(1)))
    writer.check()
    assert order == []
    gate.set()
    writer.submit(lambda: order.append(2))
    writer.close()
    assert order == [1, 2]


@pytest.mark.parametrize('ask', ['wait', 'close', 'check', 'submit'])
def test_failure_reaches_whoever_asks_next_and_only_once(ask):
    writer = BackgroundWriter()
    writer.submit(fail)
    while ask == 'check' and not writer._job.done():
        pass
    with pytest.raises(OSError, match='disk full'):
        writer.submit(fail) if ask == 'submit' else getattr(writer, ask)()
    writer.wait()
