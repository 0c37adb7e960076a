"""Reading training checkpoints in the published layout: one ``iter_<N>.pth``, pickled by ``torch.save``.

It holds ``meta`` (completed iterations, seed, config, ...), ``state_dict`` (tensors by their names in the whole model),
``optimizer`` (by the path of what is trained, what its optimiser remembers by parameter name) and, of runs in float16,
``loss_scaler``. Nothing but tensors, containers, numbers and texts is ever unpickled.
"""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lakonlab.storage.checkpoint import CheckpointError
from lakonlab.storage.errors import StorageError
from lakonlab.storage.fetch import fetch

#: Parameter name -> slot, such as ``exp_avg`` -> tensor or plain value.
OptimizerState = dict[str, dict[str, Any]]

PLAIN_TYPES = (bool, int, float, str)
#: Type code of NumPy -> format of ``struct``.
NUMBER_FORMATS = {'b1': '?', 'i4': 'i', 'i8': 'q', 'u1': 'B', 'u4': 'I', 'u8': 'Q', 'f2': 'e', 'f4': 'f', 'f8': 'd'}
BYTE_ORDERS = {'<': '<', '>': '>', '=': '=', '|': '='}


@dataclass(frozen=True)
class PublishedCheckpoint:
    """The content of a published training checkpoint; tensors are mapped from the file, not yet read.

    Args:
        path: The file.
        iteration: Completed iterations.
        seed: Seed of the run; None if it is not recorded.
        experiment: Name of the run; empty if it is not recorded.
        version: Version of the library that wrote it; empty if it is not recorded.
        config_text: Text of the config; empty if it is not recorded.
        model: Tensors by their names in the whole model.
        optimizers: Path of what is trained -> parameter name in the whole model -> slot -> value.
        has_loss_scaler: Whether it holds the state of a loss scaler.
    """

    path: Path
    iteration: int
    seed: int | None
    experiment: str
    version: str
    config_text: str
    model: dict[str, Tensor]
    optimizers: dict[str, OptimizerState]
    has_loss_scaler: bool


def read_published_checkpoint(path: str | Path, with_optimizers: bool = True) -> PublishedCheckpoint:
    """Read a training checkpoint in the published layout.

    Args:
        path: A ``.pth`` file, of any scheme.
        with_optimizers: Whether to look at what the optimisers remember.

    Returns:
        Its content.

    Raises:
        CheckpointError: There is no such file; it cannot be read, or not without unpickling objects; or it is no
            training checkpoint.
    """
    try:
        path = fetch(path)
    except StorageError as error:
        raise CheckpointError(f'checkpoint {str(path)!r} cannot be downloaded: {error}') from error
    if not path.is_file():
        raise CheckpointError(f'checkpoint {str(path)!r} does not exist, or is no file')
    content = _load(path)
    content = content if isinstance(content, Mapping) else {}
    meta, model = content.get('meta'), content.get('state_dict')
    if not isinstance(meta, Mapping) or not isinstance(model, Mapping) or not _is_count(meta.get('iter')):
        raise CheckpointError(
            f'{path} is no training checkpoint: expected a dict with meta (and in it the number iter) and state_dict, '
            f'found {_some(content) or "something else"}. Weights alone are named by `pretrained` of a network.'
        )
    others = [str(name) for name, value in model.items() if not isinstance(value, Tensor)]
    if others:
        raise CheckpointError(f'{path}: state_dict holds values that are no tensors: {_some(others)}')
    seed = meta.get('seed')
    return PublishedCheckpoint(
        path=path,
        iteration=meta['iter'],
        seed=seed if _is_count(seed) else None,
        experiment=str(meta.get('exp_name') or ''),
        version=str(meta.get('lakonlab_version') or ''),
        config_text=str(meta.get('config') or ''),
        model=dict(model),
        optimizers=_read_optimizers(content.get('optimizer'), model, path) if with_optimizers else {},
        has_loss_scaler=bool(content.get('loss_scaler')),
    )


def _load(path: Path) -> Any:
    numbers = [
        (_NumpyType, 'numpy.dtype'),
        (_numpy_number, 'numpy._core.multiarray.scalar'),
        (_numpy_number, 'numpy.core.multiarray.scalar'),
    ]
    with torch.serialization.safe_globals(numbers):
        try:
            # an archive is what torch has written since version 1.6; nothing else can be mapped
            return torch.load(path, weights_only=True, mmap=zipfile.is_zipfile(path), map_location='cpu')
        except Exception as error:  # torch raises many kinds for damaged files
            found = _foreign_objects(path)
            if not found and not isinstance(error, pickle.UnpicklingError):
                reason = str(error).partition('\n')[0] or 'it is empty'
                raise CheckpointError(
                    f'{path} cannot be read: it is damaged, or was not written by torch.save '
                    f'({type(error).__name__}: {reason})'
                ) from error
            raise CheckpointError(
                f'{path} holds objects that are not tensors, containers, numbers or texts'
                f'{f" ({_some(found)})" if found else ""}. They are never read, for that could run code that is hidden '
                'in the file. If the file is your own, load it where it was written, turn these objects into numbers '
                'and texts or remove them from its meta, and save it again.'
            ) from error


def _foreign_objects(path: Path) -> list[str]:
    """Names of the classes and functions that a file asks for and does not get; they are listed, not imported."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # no archive, or damaged beyond listing
        return []


class _NumpyType:
    """Stands for ``numpy.dtype`` while a file is read, so that the number of a metric is no foreign object."""

    def __init__(self, code: str, *_: Any):
        self.code, self.byte_order = code, '='

    def __setstate__(self, state: tuple):
        self.byte_order = BYTE_ORDERS[state[1]]


def _numpy_number(kind: _NumpyType, data: bytes) -> Any:
    """A number of NumPy as one of Python."""
    (number,) = struct.unpack(kind.byte_order + NUMBER_FORMATS[kind.code], data)
    return number


def _read_optimizers(saved: Any, model: Mapping[str, Tensor], path: Path) -> dict[str, OptimizerState]:
    if saved is None:
        return {}
    if not isinstance(saved, Mapping) or not all(isinstance(value, Mapping) for value in saved.values()):
        raise CheckpointError(f'{path}: optimizer is expected to hold a dict for every path that is trained')
    return {str(key): _read_optimizer(value.get('state'), str(key), model, path) for key, value in saved.items()}


def _read_optimizer(state: Any, key: str, model: Mapping[str, Tensor], path: Path) -> OptimizerState:
    """What an optimiser remembers, by names in the whole model; the file's are relative to it or to what is trained."""
    where = f'{path}: optimizer[{key!r}]'
    if not isinstance(state, Mapping) or not all(isinstance(slots, Mapping) for slots in state.values()):
        raise CheckpointError(f'{where} has no `state` with a dict for every parameter')
    if any(not isinstance(name, str) for name in state):
        raise CheckpointError(
            f'{where} numbers the parameters instead of naming them, so it is not known which is which: import the '
            'weights alone, with --no-optimizer'
        )
    names = {name: name if name in model else f'{key}.{name}' for name in state}
    strangers = [name for name, full in names.items() if full not in model]
    if strangers:
        raise CheckpointError(
            f'{where} names {len(strangers)} parameters that are not in state_dict: {_some(strangers)}'
        )
    read = {names[name]: dict(_flat(slots)) for name, slots in state.items()}
    for name, slots in read.items():
        for slot, value in slots.items():
            if not isinstance(value, (Tensor, *PLAIN_TYPES)):
                raise CheckpointError(f'{where}: {slot} of {name} is a {type(value).__name__}')
    return read


def _flat(slots: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Slots that hold something; newer versions of bitsandbytes put theirs one level deeper."""
    for slot, value in slots.items():
        if isinstance(value, Mapping):
            yield from _flat(value)
        elif value is not None:
            yield str(slot), value


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _some(names: Any, most: int = 8) -> str:
    names = [str(name) for name in names]
    return ', '.join(names[:most]) + (f' and {len(names) - most} more' if len(names) > most else '')
