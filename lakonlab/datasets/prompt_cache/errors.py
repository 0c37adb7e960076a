"""What can be wrong with a cache."""

from __future__ import annotations


class CacheError(OSError):
    """A cache, or a record of one, that is damaged, incomplete or of another kind; the message names it."""
