"""Plain data as JSON has them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def finite(value: Any) -> Any:
    """Plain data in which numbers that JSON does not have are texts: ``'nan'``, ``'inf'``, ``'-inf'``.

    Args:
        value: Plain data; keys become texts, and tuples lists.
    """
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
