"""Reading pickled dicts of NumPy arrays without running anything that a pickle asks for.

What a pickle names is looked up in a table of stand-ins, never imported. Arrays are made of their bytes, shape and type
here, not by NumPy's own restoring, which trusts what it is given.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np

KINDS = frozenset('biuf')
"""Kinds of elements that arrays may have: truth values and real numbers."""


class UnsafeArrayError(ValueError):
    """A pickle that is damaged, or asks for more than arrays of numbers, containers, numbers and texts."""


class _Kind:
    """Stands for ``numpy.dtype``."""

    def __init__(self, code: Any = None, *_: Any):
        if type(code) is not str:
            raise UnsafeArrayError('elements of an array are of a kind that is none')
        self.dtype = np.dtype(code)
        if self.dtype.kind not in KINDS:
            raise UnsafeArrayError(f'an array has elements of {self.dtype}, expected numbers')

    def __setstate__(self, state: Any) -> None:
        if type(state) is not tuple or len(state) < 2 or state[1] not in ('<', '>', '=', '|'):
            raise UnsafeArrayError('elements of an array are of a kind that is none')
        self.dtype = self.dtype.newbyteorder(state[1])


class _StandIn:
    """What a pickle gets for a name: it can be called, and nothing of it can be changed.

    Args:
        call: What is called; None if the name is only named.
    """

    __slots__ = ('_call',)

    def __init__(self, call: Callable[..., Any] | None = None):
        self._call = call

    def __call__(self, *arguments: Any) -> Any:
        if self._call is None:
            raise UnsafeArrayError('an array is not a plain one')
        return self._call(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise UnsafeArrayError('it changes what it names; nothing was run')


ARRAY_CLASS = _StandIn()
"""Stands for ``numpy.ndarray`` where it is named."""


class _Array:
    """Stands for an array."""

    def __init__(self, subtype: Any = None, *_: Any):
        if subtype is not ARRAY_CLASS:
            raise UnsafeArrayError('an array is not a plain one')
        self.value: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        if type(state) is not tuple or len(state) != 5:
            raise UnsafeArrayError('an array is not a plain one')
        _, shape, kind, in_columns, content = state
        self.value = _array_of(content, kind, shape, 'F' if in_columns else 'C')


def _buffer(content: Any, kind: Any, shape: Any, order: Any) -> _Array:
    """An array as protocol 5 has them."""
    array = _Array(ARRAY_CLASS)
    array.value = _array_of(content, kind, shape, order)
    return array


def _array_of(content: Any, kind: Any, shape: Any, order: Any) -> np.ndarray:
    if type(kind) is not _Kind or type(content) not in (bytes, bytearray) or order not in ('C', 'F'):
        raise UnsafeArrayError('an array is not a plain one')
    if type(shape) is not tuple or any(type(length) is not int or length < 0 for length in shape):
        raise UnsafeArrayError('an array has a shape that is none')
    if math.prod(shape) * kind.dtype.itemsize != len(content):
        raise UnsafeArrayError(f'an array of shape {shape} has {len(content)} bytes')
    return np.frombuffer(content, kind.dtype).reshape(shape, order=order)


def _number(kind: Any, content: Any = None) -> bool | int | float:
    return _array_of(content, kind, (), 'C').item()


def _latin1(text: Any, encoding: Any) -> bytes:
    """Bytes as protocol 2 has them."""
    if type(text) is not str or encoding != 'latin1':
        raise UnsafeArrayError('bytes are in an unknown encoding')
    return text.encode('latin1')


CALLS: dict[str, _StandIn] = {
    'numpy.dtype': _StandIn(_Kind),
    'numpy.ndarray': ARRAY_CLASS,
    '_codecs.encode': _StandIn(_latin1),
}
for _core in ('numpy.core', 'numpy._core'):
    CALLS[f'{_core}.multiarray._reconstruct'] = _StandIn(_Array)
    CALLS[f'{_core}.multiarray.scalar'] = _StandIn(_number)
    CALLS[f'{_core}.numeric._frombuffer'] = _StandIn(_buffer)


class _Unpickler(pickle.Unpickler):
    """Knows the stand-ins above, whatever a pickle names; it imports nothing."""

    def find_class(self, module: str, name: str) -> Any:
        if f'{module}.{name}' not in CALLS:
            raise UnsafeArrayError(f'it names {module}.{name}, which is no part of an array; nothing was run')
        return CALLS[f'{module}.{name}']

    def persistent_load(self, pid: Any) -> Any:
        raise UnsafeArrayError('it refers to objects outside of it')


def read_array_pickle(stream: BinaryIO) -> dict[str, Any]:
    """Read a pickled dict of arrays.

    Args:
        stream: The pickle.

    Returns:
        Name -> array of numbers (which cannot be written to), number or text.

    Raises:
        UnsafeArrayError: It is damaged, holds no dict of these, or names anything else, which is said.
    """
    try:
        content = _Unpickler(stream).load()
    except UnsafeArrayError:
        raise
    except Exception as error:  # damaged pickles fail in any way
        raise UnsafeArrayError(f'it is damaged ({type(error).__name__}: {error})') from error
    if type(content) is not dict:
        raise UnsafeArrayError(f'it holds a {type(content).__name__}, expected a dict of arrays')
    read = {name: value.value if type(value) is _Array else value for name, value in content.items()}
    for name, value in read.items():
        if type(name) is not str or not isinstance(value, (np.ndarray, bool, int, float, str, type(None))):
            raise UnsafeArrayError(f'{name!r} is a {type(value).__name__}, expected an array, a number or a text')
    return read
