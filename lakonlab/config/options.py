"""Options of the command line, ``key=value``, and how they change a config."""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterable, Mapping
from typing import Any

from lakonlab.config.errors import ConfigError

_WORDS = {'true': True, 'false': False, 'none': None}


def parse_options(items: Iterable[str]) -> dict[str, Any]:
    """Read ``key=value`` pairs.

    Args:
        items: Such as ``train_cfg.nfe=2``, ``optimizer.diffusion.betas=(0.9,0.95)``, ``evaluation.0.viz_num=8``. A
            value that is no Python literal is a string; ``a,b`` without brackets is a list.

    Returns:
        Dotted key -> value.

    Raises:
        ConfigError: There is no ``=``.
    """
    options = {}
    for item in items:
        key, separator, value = item.partition('=')
        if not separator or not key.strip():
            raise ConfigError(f'--cfg-options {item!r}: expected key=value')
        options[key.strip()] = _parse_value(value.strip())
    return options


def _parse_value(text: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    brackets = {'[': (']', list), '(': (')', tuple)}
    if text[:1] in brackets and text.endswith(brackets[text[0]][0]):
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError):
            kind = brackets[text[0]][1]
            return kind(_parse_value(part) for part in _split(text[1:-1]))
    parts = _split(text)
    if len(parts) > 1 and text[:1] not in '{\'"':
        return [_parse_value(part) for part in parts]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _split(text: str) -> list[str]:
    """Parts between commas that are in no bracket or quotes."""
    parts, depth, quote, start = [], 0, '', 0
    for index, char in enumerate(text):
        if quote:
            quote = '' if char == quote else quote
        elif char in '\'"':
            quote = char
        elif char in '([{':
            depth += 1
        elif char in ')]}':
            depth -= 1
        elif char == ',' and depth == 0:
            parts.append(text[start:index].strip())
            start = index + 1
    parts.append(text[start:].strip())
    return [part for part in parts if part]


def apply_options(values: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Set values by dotted key; dicts that do not exist yet are made.

    Args:
        values: A config's values.
        options: Dotted key -> value; an integer selects an existing item of a list or tuple.

    Returns:
        A changed copy.

    Raises:
        ConfigError: A key leads through a value that is neither a dict nor a list, or an index does not exist.
    """
    changed = copy.deepcopy(dict(values))
    for dotted, value in options.items():
        changed = _set(changed, dotted.split('.'), value, dotted)
    return changed


def _set(node: Any, keys: list[str], value: Any, dotted: str) -> Any:
    if not keys:
        return value
    key, rest = keys[0], keys[1:]
    if isinstance(node, dict):
        found = node.get(key, {} if rest else None)
        if rest and found is None:
            found = {}
        return {**node, key: _set(found, rest, value, dotted)}
    if isinstance(node, (list, tuple)):
        if not key.lstrip('-').isdigit() or not -len(node) <= int(key) < len(node):
            raise ConfigError(
                f'--cfg-options {dotted}: {key!r} is no index of a list of {len(node)} (expected 0 to {len(node) - 1})'
            )
        items = list(node)
        items[int(key)] = _set(items[int(key)], rest, value, dotted)
        return type(node)(items)
    raise ConfigError(f'--cfg-options {dotted}: {key!r} is asked of {node!r}, which is neither a dict nor a list')
