"""Reading pickled tensors without running anything that a pickle asks for.

Python's unpickler imports what a stream names and calls it. This one is a machine of its own for the few opcodes that
pickles of dicts, texts, numbers and tensors consist of: a name is never looked up, it is compared with a table, and the
only calls are those of the functions in that table. Storages of tensors are pickled as the old format of
``torch.save``, a pickle inside the pickle, which the same machine reads; torch itself cannot read that of float8
tensors.
"""

from __future__ import annotations

import io
import math
import pickletools
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

#: A tensor may be a view that repeats its elements only up to this size.
MAX_REPEATED_BYTES = 1 << 20
MAX_DIMENSIONS = 16
#: Of one pickle; records take some hundreds.
MAX_OPCODES = 1 << 20
BYTES_OF_REFERENCE = 8
#: What a name in a message may look like; anything else in a file is never put into one.
SHOWN_NAME = re.compile(r'[A-Za-z0-9_.]{1,80}')
TORCH_MAGIC = 0x1950A86A20F9469CFC6C
TORCH_PROTOCOL = 1001

DTYPES = {
    name: getattr(torch, name)
    for name in (
        *('float64', 'float32', 'float16', 'bfloat16', 'float8_e4m3fn', 'float8_e5m2'),
        *('int64', 'int32', 'int16', 'int8', 'uint8', 'bool'),
    )
}
#: Name of a storage class -> dtype of its elements; an untyped one counts bytes.
STORAGES = {
    'DoubleStorage': torch.float64,
    'FloatStorage': torch.float32,
    'HalfStorage': torch.float16,
    'BFloat16Storage': torch.bfloat16,
    'LongStorage': torch.int64,
    'IntStorage': torch.int32,
    'ShortStorage': torch.int16,
    'CharStorage': torch.int8,
    'ByteStorage': torch.uint8,
    'BoolStorage': torch.bool,
    'UntypedStorage': None,
}


class UnsafePickleError(ValueError):
    """A pickle that is damaged, or asks for more than tensors, containers, numbers and texts."""


@dataclass(frozen=True)
class _Name:
    """A class or function that a pickle names: two words, nothing behind them."""

    module: str
    name: str


@dataclass(frozen=True)
class _Storage:
    """The bytes of a tensor."""

    content: bytes
    dtype: torch.dtype | None


class _Budget:
    """Bytes that the results of all calls may take, so that a small file cannot ask for much memory.

    Args:
        available: The bytes.
    """

    def __init__(self, available: int):
        self.available = available

    def spend(self, value: Any) -> None:
        """Count what was made.

        Raises:
            UnsafePickleError: It is too much.
        """
        if isinstance(value, Tensor):
            self.available -= value.numel() * value.element_size()
        elif type(value) is _Storage:
            self.available -= len(value.content)
        elif type(value) is bytes:
            self.available -= len(value)
        elif type(value) is tuple:
            self.available -= BYTES_OF_REFERENCE * len(value)
        if self.available < 0:
            raise UnsafePickleError('its tensors take much more memory than itself')


class _Mark:
    """Where a group of values begins on the stack."""


def read_pickle(content: bytes) -> Any:
    """Read a pickle of protocol 2 or later that holds tensors on CPUs, dicts, lists, tuples, texts, bytes and numbers.

    Args:
        content: The whole pickle, nothing behind it.

    Returns:
        The value; tensors own their memory and are contiguous, ``torch.Size`` is a tuple.

    Raises:
        UnsafePickleError: It is damaged, or names anything else, which is said.
    """
    stream = io.BytesIO(content)
    # every byte of a tensor is in the file, and is taken as bytes (protocol 2), in a storage and in the tensor
    value = _run(stream, partial(_reduce, _Budget(3 * len(content) + MAX_REPEATED_BYTES)), None)
    if stream.read(1):
        raise UnsafePickleError('there are bytes behind its end')
    return value


def _run(stream: io.BytesIO, reduce: Callable[[_Name, tuple], Any], persistent: Callable[[Any], Any] | None) -> Any:
    """Read one pickle from a stream."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def pop() -> Any:
        if not stack or isinstance(stack[-1], _Mark):
            raise UnsafePickleError('it takes more values than it has')
        return stack.pop()

    def pop_group() -> list[Any]:
        group = []
        while stack and not isinstance(stack[-1], _Mark):
            group.append(stack.pop())
        if not stack:
            raise UnsafePickleError('it takes more values than it has')
        stack.pop()
        return group[::-1]

    def top(kind: type) -> Any:
        if not stack or type(stack[-1]) is not kind:
            raise UnsafePickleError(f'it fills something that is no {kind.__name__}')
        return stack[-1]

    def fill(pairs: list[Any]) -> None:
        target = top(dict)
        if len(pairs) % 2 or any(type(key) is not str for key in pairs[::2]):
            raise UnsafePickleError('a dict has a key that is no text')
        target.update(zip(pairs[::2], pairs[1::2], strict=True))

    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if count == MAX_OPCODES:
                raise UnsafePickleError(f'it has more than {MAX_OPCODES} opcodes')
            name = opcode.name
            if name in LITERALS:
                stack.append(argument)
            elif name in CONSTANTS:
                stack.append(CONSTANTS[name]())
            elif name == 'MARK':
                stack.append(_Mark())
            elif name == 'MEMOIZE':
                memo[len(memo)] = stack[-1]
            elif name in ('BINPUT', 'LONG_BINPUT'):
                memo[argument] = stack[-1]
            elif name in ('BINGET', 'LONG_BINGET'):
                stack.append(memo[argument])
            elif name == 'TUPLE':
                stack.append(tuple(pop_group()))
            elif name in TUPLES:
                stack.append(tuple([pop() for _ in range(TUPLES[name])][::-1]))
            elif name == 'APPEND':
                value = pop()
                top(list).append(value)
            elif name == 'APPENDS':
                values = pop_group()
                top(list).extend(values)
            elif name == 'SETITEM':
                value = pop()
                fill([pop(), value])
            elif name == 'SETITEMS':
                fill(pop_group())
            elif name == 'GLOBAL':
                stack.append(_Name(*argument.split(' ', 1)))
            elif name == 'STACK_GLOBAL':
                word, module = pop(), pop()
                if type(word) is not str or type(module) is not str:
                    raise UnsafePickleError('it names something by what is no text')
                stack.append(_Name(module, word))
            elif name == 'REDUCE':
                arguments, called = pop(), pop()
                if type(called) is not _Name or type(arguments) is not tuple:
                    raise UnsafePickleError('it calls something that is no function')
                stack.append(reduce(called, arguments))
            elif name == 'BINPERSID' and persistent is not None:
                stack.append(persistent(pop()))
            elif name == 'STOP':
                value = pop()
                if stack:
                    raise UnsafePickleError('it ends before all its values are used')
                return value
            elif name not in ('PROTO', 'FRAME'):
                raise UnsafePickleError(f'it holds the opcode {name}, which pickled tensors do not need')
    except UnsafePickleError:
        raise
    except (
        *(ValueError, KeyError, IndexError, TypeError, AttributeError, EOFError, OverflowError, struct.error),
        *(RuntimeError, RecursionError, MemoryError),
    ) as error:  # what they say may hold what is in the file, of any size
        raise UnsafePickleError(f'it is damaged ({type(error).__name__})') from None
    raise UnsafePickleError('it ends early')


LITERALS = frozenset(
    (
        *('BININT', 'BININT1', 'BININT2', 'LONG1', 'BINFLOAT'),
        *('SHORT_BINUNICODE', 'BINUNICODE', 'BINUNICODE8', 'SHORT_BINBYTES', 'BINBYTES', 'BINBYTES8'),
    )
)
CONSTANTS: dict[str, Callable[[], Any]] = {
    'NONE': lambda: None,
    'NEWTRUE': lambda: True,
    'NEWFALSE': lambda: False,
    'EMPTY_DICT': dict,
    'EMPTY_LIST': list,
    'EMPTY_TUPLE': tuple,
}
TUPLES = {'TUPLE1': 1, 'TUPLE2': 2, 'TUPLE3': 3}


def _reduce(budget: _Budget, called: _Name, arguments: tuple) -> Any:
    """The value of a call that a pickled tensor may hold."""
    key = f'{called.module}.{called.name}'
    if key not in CALLS:
        raise UnsafePickleError(f'it calls {_shown(called)}, which is no part of a tensor; nothing was run')
    value = CALLS[key](*arguments)
    if not any(value is argument for argument in arguments):
        budget.spend(value)
    return value


def _shown(name: _Name) -> str:
    """A name for a message."""
    text = f'{name.module}.{name.name}'
    return text if SHOWN_NAME.fullmatch(text) else 'something by an odd name'


def _rebuild_tensor(
    storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any = False, hooks: Any = None, *rest: Any
) -> Tensor:
    """A tensor of a storage; with a dtype as the next argument if the storage is untyped."""
    if type(storage) is not _Storage:
        raise UnsafePickleError('a tensor has something that is no storage')
    dtype = storage.dtype
    if rest and type(rest[0]) is _Name:
        dtype = DTYPES.get(rest[0].name) if rest[0].module == 'torch' else None
        if dtype is None:
            raise UnsafePickleError(f'a tensor has the dtype {_shown(rest[0])}')
    if dtype is None:
        dtype = torch.uint8
    if type(size) is not tuple or type(stride) is not tuple or not len(size) == len(stride) <= MAX_DIMENSIONS:
        raise UnsafePickleError('a tensor has a shape that is none')
    if any(type(number) is not int or number < 0 for number in (offset, *size, *stride)):
        raise UnsafePickleError('a tensor has a shape that is none')
    count = math.prod(size)
    if count == 0:
        return torch.empty(size, dtype=dtype)
    last = offset + sum((length - 1) * step for length, step in zip(size, stride))
    available = len(storage.content) // dtype.itemsize
    if last >= available or count * dtype.itemsize > max(len(storage.content), MAX_REPEATED_BYTES):
        raise UnsafePickleError(f'a tensor is larger than its {len(storage.content)} bytes')
    # a copy of no more than the tensor reaches, so that it may be written to and keeps nothing else in memory
    reached = bytearray(memoryview(storage.content)[offset * dtype.itemsize : (last + 1) * dtype.itemsize])
    elements = torch.frombuffer(reached, dtype=dtype).as_strided(size, stride)
    return elements.contiguous()


def _load_storage(content: Any) -> _Storage:
    """A storage in the old format of ``torch.save``: five pickles, then a count and the bytes."""
    if type(content) is not bytes:
        raise UnsafePickleError('a storage is no bytes')
    stream = io.BytesIO(content)
    found: dict[str, tuple[torch.dtype | None, int]] = {}

    def persistent(identity: Any) -> str:
        if type(identity) is not tuple or len(identity) not in (5, 6) or identity[0] != 'storage':
            raise UnsafePickleError('a storage has no description')
        kind, key, _, count = identity[1:5]  # the device is not used: everything is read to the CPU
        if type(kind) is not _Name or kind.module not in ('torch', 'torch.storage') or kind.name not in STORAGES:
            raise UnsafePickleError('a storage is of an unknown class')
        if type(key) is not str or type(count) is not int or (len(identity) == 6 and identity[5] is not None):
            raise UnsafePickleError('a storage has no description')
        found[key] = STORAGES[kind.name], count
        return key

    if _run(stream, _no_call, None) != TORCH_MAGIC or _run(stream, _no_call, None) != TORCH_PROTOCOL:
        raise UnsafePickleError('a storage is not in the format of torch.save')
    system = _run(stream, _no_call, None)
    if type(system) is not dict or system.get('little_endian') is not True:
        raise UnsafePickleError('a storage was written on a machine of another byte order')
    key = _run(stream, _no_call, persistent)
    if _run(stream, _no_call, None) != [key] or len(found) != 1 or key not in found:
        raise UnsafePickleError('a storage is not a single one')
    dtype, count = found[key]
    header = stream.read(8)
    itemsize = 1 if dtype is None else dtype.itemsize
    data = stream.read()
    if len(header) != 8 or struct.unpack('<q', header)[0] != count or len(data) != count * itemsize:
        raise UnsafePickleError(f'a storage has {len(data)} bytes, which is not what it says')
    return _Storage(data, dtype)


def _no_call(called: _Name, arguments: tuple) -> Any:
    raise UnsafePickleError(f'a storage calls {_shown(called)}; nothing was run')


def _size(values: Any = ()) -> tuple:
    if type(values) not in (tuple, list):
        raise UnsafePickleError('a torch.Size is of something that is no tuple')
    return tuple(values)


def _empty_dict(*values: Any) -> dict:
    if values:
        raise UnsafePickleError('an OrderedDict is made of arguments')
    return {}


def _latin1(text: Any, encoding: Any) -> bytes:
    """Bytes as protocol 2 has them."""
    if type(text) is not str or encoding != 'latin1':
        raise UnsafePickleError('bytes are in an unknown encoding')
    return text.encode('latin1')


def _parameter(data: Any, *_: Any) -> Tensor:
    if type(data) is not Tensor:
        raise UnsafePickleError('a parameter is no tensor')
    return data


CALLS: dict[str, Callable[..., Any]] = {
    'torch._utils._rebuild_tensor': _rebuild_tensor,
    'torch._utils._rebuild_tensor_v2': _rebuild_tensor,
    'torch._utils._rebuild_tensor_v3': _rebuild_tensor,
    'torch._utils._rebuild_parameter': _parameter,
    'torch.storage._load_from_bytes': _load_storage,
    'torch.Size': _size,
    'collections.OrderedDict': _empty_dict,
    '_codecs.encode': _latin1,
}
