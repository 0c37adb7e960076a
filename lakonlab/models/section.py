"""Typed views of the shared config sections ``train_cfg`` and ``test_cfg``.

One section serves several classes (the whole, its diffusion, its teacher), so each declares the keys it reads as a
dataclass; the union of the dataclasses is what the config checker accepts.
"""

from __future__ import annotations

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
