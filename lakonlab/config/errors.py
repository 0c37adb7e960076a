"""What is raised when a config cannot be used."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class ConfigError(ValueError):
    """A config cannot be used; the message names the key, what was found, what was expected and how to fix it."""


def nearest(name: str, valid: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The valid name that a misspelt one probably means, or None."""
    found = get_close_matches(str(name), [str(key) for key in valid], n=1, cutoff=cutoff)
    return found[0] if found else None


def shorten(value: object, most_characters: int = 60) -> str:
    """``repr`` of a value, cut to a length that fits into a message."""
    text = repr(value)
    return text if len(text) <= most_characters else f'{text[: most_characters - 4]} ...'


def describe_unknown(
    path: str, what: str, name: str, valid: Iterable[str], *, value: object = ..., most_listed: int = 30
) -> str:
    """Message about a name that does not exist.

    Args:
        path: Full dotted key.
        what: What the name would be (``argument of GaussianFlow``, ``type``, ...).
        name: The name that was found.
        valid: Names that exist.
        value: What was found under the name, if it is a key.
        most_listed: All valid names are listed if there are no more than this.
    """
    valid = sorted(set(valid))
    found = '' if value is ... else f' (found {name}={shorten(value)})'
    message = f'{path}: {name!r} is no {what}{found}'
    suggestion = nearest(name, valid)
    if suggestion is not None:
        message += f'; did you mean {suggestion!r}?'
    elif not valid:
        message += '; none is expected here'
    if valid and len(valid) <= most_listed:
        message += f'{"" if suggestion else ";"} Valid: {", ".join(valid)}'
    return message
