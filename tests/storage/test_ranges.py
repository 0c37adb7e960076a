"""Streams over a server that sends stretches and fails now and then."""

import io
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lakonlab.storage import ranges, retry
from lakonlab.storage.errors import RestartError, StorageError, TransientError
from lakonlab.storage.ranges import Answer, chunks_of, open_ranges

CONTENT = random.Random(0).randbytes(5000)


class Server:
    """Sends stretches of a content; each answer breaks off after some bytes.

    Args:
        limits: Bytes after which answers break off, one after the other, then none does.
        version: What it calls the content; None to say nothing.
        whole: Whether it ignores what is asked and sends everything.
    """

    def __init__(self, limits=(), version='v', whole=False):
        self.limits, self.version, self.whole = list(limits), version, whole
        self.asked, self.closed = [], 0

    def open_at(self, start, stop, version):
        self.asked.append((start, stop))
        if start >= len(CONTENT):
            return None
        first = 0 if self.whole else start
        limit = self.limits.pop(0) if self.limits else len(CONTENT)
        stream = io.BytesIO(CONTENT[first : len(CONTENT) if self.whole else stop][:limit])

        def close():
            self.closed += 1

        def read(count):
            return stream.read(min(count, 700))

        return Answer(first, len(CONTENT), self.version, read, close)


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    monkeypatch.setattr(retry, 'FIRST_DELAY', 0.0)


@given(
    st.lists(st.integers(0, 4000), max_size=6),
    st.integers(0, 5200),
    st.one_of(st.none(), st.integers(0, 5200)),
    st.booleans(),
)
def test_any_stretch_with_any_failures(limits, start, stop, whole):
    server = Server(limits, whole=whole)
    expected = CONTENT[start:stop]
    assert b''.join(chunks_of(server.open_at, 'a', start, stop)) == expected
    assert server.closed == sum(first < len(CONTENT) for first, _ in server.asked)


@given(
    st.lists(st.tuples(st.integers(0, 6000), st.integers(0, 3000)), max_size=8),
    st.lists(st.integers(1, 900), max_size=4),
)
def test_stream_equals_a_file(jumps, limits):
    server = Server(limits)
    stream = open_ranges(lambda start, stop: chunks_of(server.open_at, 'a', start, stop), len(CONTENT))
    file = io.BytesIO(CONTENT)
    for position, count in jumps:
        assert stream.seek(position) == file.seek(position)
        assert stream.read(count) == file.read(count)
        assert stream.tell() == file.tell()
    assert stream.read() == file.read()


def test_windows_grow_while_it_is_read_in_order(monkeypatch):
    monkeypatch.setattr(ranges, 'FIRST_WINDOW', 500)
    server = Server()
    reader = ranges.RangeReader(lambda start, stop: chunks_of(server.open_at, 'a', start, stop), len(CONTENT))
    assert reader.readall() == CONTENT
    assert server.asked == [(0, 500), (500, 1500), (1500, 3500), (3500, 5000)]
    reader.seek(10)
    reader.read(1)
    assert server.asked[-1] == (10, 510)


def test_a_content_that_changes_is_an_error():
    server = Server([1000])
    chunks = chunks_of(server.open_at, 'a')
    next(chunks)
    server.version = 'w'
    with pytest.raises(StorageError, match='a was replaced while it was read'):
        list(chunks)


def test_without_a_version_nothing_is_continued():
    with pytest.raises(RestartError, match='ended after 1000 of 5000 bytes'):
        list(chunks_of(Server([1000], version=None).open_at, 'a'))
    assert b''.join(chunks_of(Server([0, 0], version=None).open_at, 'a')) == CONTENT


def test_progress_makes_patient(monkeypatch):
    """A connection that is lost again and again is no reason to give up, as long as something arrives."""
    monkeypatch.setattr(retry, 'FIRST_DELAY', 1.0)
    monkeypatch.setattr(retry.time, 'sleep', lambda seconds: None)
    monkeypatch.setattr(ranges, 'PROGRESS_BYTES', 50)
    monkeypatch.setenv('LAKONLAB_RETRY_SECONDS', '3')
    assert b''.join(chunks_of(Server([60] * 60).open_at, 'a')) == CONTENT
    with pytest.raises(TransientError, match=r'gave up reading a after [34] attempts'):
        list(chunks_of(Server([5] * 60).open_at, 'a'))
