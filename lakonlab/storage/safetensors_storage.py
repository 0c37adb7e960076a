"""Safetensors files as storage of torch.distributed.checkpoint.

torch's own safetensors storage holds one box of a tensor per process. Here a process may hold several (see
:mod:`lakonlab.storage.pieces`), each an entry of a file with its offsets in the header. An entry that is a whole tensor
bears the tensor's name, so other programs read such files as they are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence

import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from lakonlab.storage.pieces import Pieces
from lakonlab.storage.ranged_safetensors import DTYPES, open_safetensors
from lakonlab.storage.remote_path import AnyPath

MAX_FILE_BYTES = 1 << 28  # a file is put together in memory
PIECES = 'pieces'


class SafetensorsWriter(StorageWriter):
    """Writes what one process contributes to a checkpoint.

    Args:
        write: Called with the name of each file and its content; when it returns, the file lasts.
        rank: Number of this process, part of the names of its files.
    """

    def __init__(self, write: Callable[[str, bytes], object], rank: int = 0):
        self._write, self.rank = write, rank

    def reset(self, checkpoint_id=None) -> None:
        """See the base class; there is nothing to forget."""

    def set_up_storage_writer(self, is_coordinator, *args, **kwargs) -> None:
        """See the base class; the directory exists already."""

    def prepare_local_plan(self, plan):
        """See the base class."""
        return plan

    def prepare_global_plan(self, plans):
        """See the base class."""
        return plans

    def write_data(self, plan, planner) -> Future[list[WriteResult]]:
        """See the base class; files of at most 256 MiB, or one tensor."""
        results: list[WriteResult] = []
        batch: dict[str, Tensor] = {}
        partial: dict[str, dict] = {}
        number = size = 0

        def flush() -> None:
            nonlocal number, size
            if batch:
                number += 1
                content = safetensors.torch.save(batch, {PIECES: json.dumps(partial)} if partial else None)
                self._write(f'rank_{self.rank:05d}_{number:05d}.safetensors', content)
            batch.clear()
            partial.clear()
            size = 0

        for item in plan.items:
            tensor = planner.resolve_data(item).detach().cpu().contiguous()
            num_bytes = tensor.numel() * tensor.element_size()
            if batch and size + num_bytes > MAX_FILE_BYTES:
                flush()
            name, offsets = item.index.fqn, list(item.tensor_data.chunk.offsets)
            key = name
            if tensor.shape != item.tensor_data.size:
                key = f'{name}@{",".join(map(str, offsets))}'
                partial[key] = {'name': name, 'offsets': offsets, 'shape': list(item.tensor_data.size)}
            batch[key] = tensor
            size += num_bytes
            results.append(WriteResult(item.index, num_bytes, None))
        flush()
        return _finished(results)

    def finish(self, metadata, results) -> None:
        """See the base class; every file describes itself, so there is nothing more to write."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id) -> bool:
        """See the base class."""
        return True


class SafetensorsReader(StorageReader):
    """Reads safetensors files, whichever processes wrote them.

    Args:
        paths: The files.
    """

    def __init__(self, paths: Sequence[AnyPath]):
        self.paths = paths
        self._places: dict[MetadataIndex, tuple[AnyPath, str]] = {}

    def reset(self, checkpoint_id=None) -> None:
        """See the base class; there is nothing to forget."""

    def read_metadata(self, *args, **kwargs) -> Metadata:
        """See the base class; reads the headers of all files."""
        tensors: dict[str, TensorStorageMetadata] = {}
        for path in self.paths:
            with open_safetensors(path) as file:
                partial = json.loads((file.metadata() or {}).get(PIECES, '{}'))
                for key in file.keys():  # noqa: SIM118 - it is no mapping
                    entry = file.get_slice(key)
                    sizes = torch.Size(entry.get_shape())
                    own = {'name': key, 'offsets': [0] * len(sizes), 'shape': sizes}
                    description = partial.get(key, own)
                    name, offsets = description['name'], torch.Size(description['offsets'])
                    if name not in tensors:
                        properties = TensorProperties(DTYPES[entry.get_dtype()])
                        tensors[name] = TensorStorageMetadata(properties, torch.Size(description['shape']), [])
                    tensors[name].chunks.append(ChunkStorageMetadata(offsets, sizes))
                    self._places[MetadataIndex(name, offsets)] = (path, key)
        return Metadata(state_dict_metadata=dict(tensors))

    def set_up_storage_reader(self, metadata, is_coordinator, *args, **kwargs) -> None:
        """See the base class."""

    def prepare_local_plan(self, plan):
        """See the base class."""
        return plan

    def prepare_global_plan(self, plans):
        """See the base class."""
        return plans

    def read_data(self, plan, planner) -> Future[None]:
        """See the base class; only the parts that this process needs are read."""
        by_file: dict[AnyPath, list] = {}
        for item in plan.items:
            path, key = self._places[MetadataIndex(item.storage_index.fqn, item.storage_index.offset)]
            by_file.setdefault(path, []).append((key, item))
        for file_path, items in by_file.items():
            wanted = [
                (key, tuple(slice(start, start + size) for start, size in zip(item.storage_offsets, item.lengths)))
                for key, item in items
            ]
            with open_safetensors(file_path) as file:
                for number, tensor in file.read(wanted):
                    item = items[number][1]
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(tensor)
                    planner.commit_tensor(item, target)
        return _finished(None)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id) -> bool:
        """See the base class."""
        return True


class PiecesSavePlanner(dcp.DefaultSavePlanner):
    """Plans a save of :class:`Pieces`."""

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """The tensor that an item of the plan names."""
        return self.state_dict[index.fqn].at(index.offset)


class PiecesLoadPlanner(dcp.DefaultLoadPlanner):
    """Plans a load into :class:`Pieces`."""

    def set_up_planner(self, state_dict, metadata=None, is_coordinator=False) -> None:
        """See the base class, which would look for tensors inside of the values."""
        self.original_state_dict = self.state_dict = state_dict
        self.metadata, self.is_coordinator = metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """The tensor that an item of the plan names."""
        return self.state_dict[index.fqn].at(index.offset)


def save_pieces(
    pieces: Mapping[str, Pieces], write: Callable[[str, bytes], object], rank: int = 0, world_size: int = 1, group=None
) -> None:
    """Write a part of a checkpoint; every process of the group calls this.

    Args:
        pieces: What this process holds, by name.
        write: See :class:`SafetensorsWriter`.
        rank: Number of this process.
        world_size: Number of processes.
        group: Their process group; None for the default one.
    """
    planner = PiecesSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    writer = SafetensorsWriter(write, rank)
    dcp.save(dict(pieces), storage_writer=writer, planner=planner, process_group=group, no_dist=world_size == 1)


def load_pieces(pieces: Mapping[str, Pieces], paths: Sequence[AnyPath]) -> None:
    """Fill pieces in place from the files of a part; no process waits for another."""
    planner = PiecesLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    dcp.load(dict(pieces), storage_reader=SafetensorsReader(paths), planner=planner, no_dist=True)


def tensors_in(paths: Sequence[AnyPath]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Name -> (shape, dtype) of every tensor in some files, without reading the tensors."""
    entries = SafetensorsReader(paths).read_metadata().state_dict_metadata
    return {name: (entry.size, entry.properties.dtype) for name, entry in entries.items()}


def _finished(value) -> Future:
    future: Future = Future()
    future.set_result(value)
    return future
