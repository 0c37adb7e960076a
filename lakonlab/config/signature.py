"""What constructors and sections accept."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Arguments:
    """Arguments that a callable accepts by name.

    Args:
        names: Their names.
        required: Those without a default.
        is_open: Whether any other name is accepted too.
        defaults: Name -> default.
    """

    names: frozenset[str]
    required: frozenset[str]
    is_open: bool
    defaults: Mapping[str, Any]


def arguments_of(target: Callable, positional: int = 0) -> Arguments:
    """Arguments of a function or of a class's constructor.

    A constructor with ``**kwargs`` is taken to hand them to the constructor of its base, so the arguments of that are
    accepted as well, and so on; if the last one has ``**kwargs`` too, every name is accepted.

    Args:
        target: The function or class.
        positional: How many leading arguments the caller fills in by position.
    """
    found: dict[str, inspect.Parameter] = {}
    is_open = False
    for function in _constructors(target):
        parameters = list(inspect.signature(function).parameters.values())
        if inspect.isclass(target):
            parameters = parameters[1:]
        is_open = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
        for parameter in parameters:
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                found.setdefault(parameter.name, parameter)
        if not is_open:
            break
    parameters = list(found.values())[positional:]
    return Arguments(
        frozenset(parameter.name for parameter in parameters),
        frozenset(parameter.name for parameter in parameters if parameter.default is parameter.empty),
        is_open,
        {parameter.name: parameter.default for parameter in parameters if parameter.default is not parameter.empty},
    )


def _constructors(target: Callable):
    if not inspect.isclass(target):
        yield target
        return
    for kind in target.__mro__:
        if kind is object or kind is nn.Module:  # nn.Module takes any arguments, only to refuse them
            return
        if '__init__' in vars(kind):
            yield vars(kind)['__init__']


def field_types(section: type) -> dict[str, Any]:
    """Field name -> type of a dataclass; Any where a type cannot be resolved."""
    try:
        hints = typing.get_type_hints(section)
    except (NameError, TypeError):
        hints = {}
    return {field.name: hints.get(field.name, Any) for field in fields(section)}


def fits(value: Any, hint: Any) -> bool:
    """Whether a plain value can be meant by a type; lists and tuples stand for each other, and 3.0 for 3."""
    if hint is Any or isinstance(hint, typing.TypeVar):
        return True
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, option) for option in typing.get_args(hint))
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    kind = origin or hint
    if kind is type(None):
        return value is None
    if kind is bool:
        return isinstance(value, (bool, int))
    if kind is int:
        return isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if kind is float:
        return isinstance(value, (int, float))
    if kind is str:
        return isinstance(value, str)
    if kind in (list, tuple, Sequence):
        return isinstance(value, (list, tuple)) or (isinstance(value, str) and kind is Sequence)
    if kind in (dict, Mapping):
        return isinstance(value, Mapping)
    return True


def type_name(hint: Any) -> str:
    """A type as a reader of a message would write it."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return ' or '.join(type_name(option) for option in typing.get_args(hint))
    if hint is type(None):
        return 'None'
    kind = typing.get_origin(hint) or hint
    return {Mapping: 'dict', Sequence: 'list'}.get(kind, getattr(kind, '__name__', str(kind)))
