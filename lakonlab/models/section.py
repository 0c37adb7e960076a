"""Typed views of the shared config sections ``train_cfg`` and ``test_cfg``.

One section serves several classes (the whole, its diffusion, its teacher), so each declares the keys it reads as a
dataclass; the union of the dataclasses is what the config checker accepts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar

View = TypeVar('View')


def read_section(
    view: type[View], section: Mapping[str, Any] | None, name: str, aliases: Mapping[str, str] | None = None
) -> View:
    """Pick the keys that ``view`` declares; keys of other classes are left alone.

    Args:
        view: A dataclass whose fields are the keys.
        section: The section; None for an empty one.
        name: Name of the section, for messages.
        aliases: Old name -> field, for keys that were renamed.

    Raises:
        ValueError: A key without a default is missing, or a key is given under its old and its new name.
    """
    values = dict(section or {})
    for old, new in (aliases or {}).items():
        if old in values:
            if new in values:
                raise ValueError(f'{name}.{old} is the old name of {name}.{new}; give only the latter')
            values[new] = values.pop(old)
    missing = [
        field.name
        for field in fields(view)
        if field.default is MISSING and field.default_factory is MISSING and field.name not in values
    ]
    if missing:
        raise ValueError(f'{name} lacks {", ".join(missing)}, which {view.__name__} needs')
    return view(**{field.name: values[field.name] for field in fields(view) if field.name in values})


def at_least(view: Any, bound: float, *names: str) -> None:
    """Refuse fields below a bound; None passes.

    Raises:
        ValueError: A field is no number or below the bound; the message begins with its name.
    """
    in_range(view, bound, math.inf, *names)


def in_range(view: Any, low: float, high: float, *names: str) -> None:
    """Refuse fields outside ``[low, high]``; None passes.

    Raises:
        ValueError: A field is no number or outside the range; the message begins with its name.
    """
    for name in names:
        value = getattr(view, name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            expected = f'a number of at least {low}' if high == math.inf else f'a number from {low} to {high}'
            raise ValueError(f'{name}={value!r}: expected {expected}')


def one_of(view: Any, choices: tuple, *names: str) -> None:
    """Refuse fields that are not one of the choices.

    Raises:
        ValueError: A field has another value; the message begins with its name.
    """
    for name in names:
        if getattr(view, name) not in choices:
            raise ValueError(f'{name}={getattr(view, name)!r}: expected one of {", ".join(map(repr, choices))}')
