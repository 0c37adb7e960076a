"""Safetensors files as storage of torch.distributed.checkpoint.

torch's own safetensors storage holds one box of a tensor per process. Here a process may hold several (see
:mod:`lakonlab.storage.pieces`), each an entry of a file with its offsets in the header. An entry that is a whole tensor
bears the tensor's name, so other programs read such files as they are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
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

from lakonlab.storage.local import write_bytes
from lakonlab.storage.pieces import Pieces

MAX_FILE_BYTES = 1 << 28  # a file is put together in memory
PIECES = 'pieces'
DTYPES = {
    'F64': torch.float64,
    'F32': torch.float32,
    'F16': torch.float16,
    'BF16': torch.bfloat16,
    'F8_E4M3': torch.float8_e4m3fn,
    'F8_E5M2': torch.float8_e5m2,
    'I64': torch.int64,
    'I32': torch.int32,
    'I16': torch.int16,
    'I8': torch.int8,
    'U8': torch.uint8,
    'BOOL': torch.bool,
    'C64': torch.complex64,
}
"""Name in the header of a file -> dtype."""


class SafetensorsWriter(StorageWriter):
    """Writes what one process contributes to a checkpoint.

    Args:
        folder: Existing directory, the same for all processes.
        rank: Number of this process, part of the names of its files.
    """

    def __init__(self, folder: Path, rank: int = 0):
        self.folder, self.rank = folder, rank

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
        """See the base class; files of at most 256 MiB, or one tensor, each flushed to the disk."""
        results: list[WriteResult] = []
        batch: dict[str, Tensor] = {}
        partial: dict[str, dict] = {}
        number = size = 0

        def flush() -> None:
            nonlocal number, size
            if batch:
                number += 1
                path = self.folder / f'rank_{self.rank:05d}_{number:05d}.safetensors'
                content = safetensors.torch.save(batch, {PIECES: json.dumps(partial)} if partial else None)
                write_bytes(path, content)
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
    """Reads a folder of safetensors files, whichever processes wrote them.

    Args:
        folder: The directory.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._places: dict[MetadataIndex, tuple[str, str]] = {}

    def reset(self, checkpoint_id=None) -> None:
        """See the base class; there is nothing to forget."""

    def read_metadata(self, *args, **kwargs) -> Metadata:
        """See the base class; reads the headers of all files."""
        tensors: dict[str, TensorStorageMetadata] = {}
        for path in sorted(self.folder.glob('*.safetensors')):
            with safe_open(path, framework='pt') as file:
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
                    self._places[MetadataIndex(name, offsets)] = (path.name, key)
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
        """See the base class; only the parts that this process needs leave the disk."""
        by_file: dict[str, list] = {}
        for item in plan.items:
            file, key = self._places[MetadataIndex(item.storage_index.fqn, item.storage_index.offset)]
            by_file.setdefault(file, []).append((key, item))
        for file_name, items in by_file.items():
            with safe_open(self.folder / file_name, framework='pt') as file:
                for key, item in items:
                    box = tuple(slice(i, i + n) for i, n in zip(item.storage_offsets, item.lengths))
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(file.get_slice(key)[box] if box else file.get_tensor(key))
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


def save_pieces(pieces: Mapping[str, Pieces], folder: Path, rank: int = 0, world_size: int = 1, group=None) -> None:
    """Write a part of a checkpoint; every process of the group calls this.

    Args:
        pieces: What this process holds, by name.
        folder: Existing directory, the same for all.
        rank: Number of this process.
        world_size: Number of processes.
        group: Their process group; None for the default one.
    """
    planner = PiecesSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    writer = SafetensorsWriter(folder, rank)
    dcp.save(dict(pieces), storage_writer=writer, planner=planner, process_group=group, no_dist=world_size == 1)


def load_pieces(pieces: Mapping[str, Pieces], folder: Path) -> None:
    """Fill pieces in place; no process waits for another."""
    planner = PiecesLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    dcp.load(dict(pieces), storage_reader=SafetensorsReader(folder), planner=planner, no_dist=True)


def tensors_in(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Name -> (shape, dtype) of every tensor in a folder, without reading the tensors."""
    entries = SafetensorsReader(folder).read_metadata().state_dict_metadata
    return {name: (entry.size, entry.properties.dtype) for name, entry in entries.items()}


def _finished(value) -> Future:
    future: Future = Future()
    future.set_result(value)
    return future
