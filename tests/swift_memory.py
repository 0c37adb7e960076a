"""Stands in for memcached in a Swift of one process, where its S3 API keeps what it would look up again and again."""

from __future__ import annotations

import json
import time


class Memory:
    """The methods of Swift's client of memcached that its filters call."""

    def __init__(self):
        self._entries: dict[str, tuple[float, str]] = {}

    def get(self, key, raise_on_error=False):
        """A value; None if there is none, or if its time is over."""
        ends, text = self._entries.get(key, (0.0, 'null'))
        return None if ends and ends < time.time() else json.loads(text)

    def set(self, key, value, serialize=True, time=0, min_compress_len=0, raise_on_error=False):
        """Keep a value, for so many seconds; 0 for ever."""
        self._entries[key] = (_now() + time if time else 0.0, json.dumps(value))

    def incr(self, key, delta=1, time=0):
        """Add to a number."""
        value = max(0, int(self.get(key) or 0) + int(delta))
        self.set(key, value, time=time)
        return value

    def decr(self, key, delta=1, time=0):
        """Subtract from a number."""
        return self.incr(key, -int(delta), time)

    def delete(self, key, server_key=None):
        """Forget a value."""
        self._entries.pop(key, None)

    def set_multi(self, mapping, server_key, serialize=True, time=0, min_compress_len=0):
        """Keep several values."""
        for key, value in mapping.items():
            self.set(key, value, time=time)

    def get_multi(self, keys, server_key):
        """Several values."""
        return [self.get(key) for key in keys]


def _now() -> float:
    return time.time()


def filter_factory(conf, **local):
    """What paste calls for a filter: every request gets the same memory."""
    memory = Memory()

    def add(app):
        def answer(environ, start_response):
            environ['swift.cache'] = memory
            return app(environ, start_response)

        return answer

    return add
