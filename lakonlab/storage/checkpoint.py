"""Checkpoints: directories of safetensors files, committed by a manifest.

``<run>/iter_<N>/`` holds one folder of tensors per part (``model``, ``optimizer``), ``state.json`` with everything that
is not a tensor, and ``manifest.json``, written last: format, iteration, library versions, the config's text, and size
and SHA-256 of every file. What has no valid manifest is no checkpoint.

Tensors go through torch.distributed.checkpoint with its safetensors writer rather than its default one: the default
writer pickles its index and every tensor, so reading it safely would need an unpickler restricted to a list of torch's
private classes; safetensors cannot hold code at all, keeps every dtype exactly (scalars, bfloat16, integers, empty
tensors), is read by other programs, and resharding on load works the same.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import re
import shutil
import time
import warnings
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lakonlab.storage.local import publish_directory, sha256_of, temporary_directory, write_json

FORMAT = 'lakonlab-checkpoint'
FORMAT_VERSION = 1
MANIFEST = 'manifest.json'
STATE = 'state.json'
LATEST_NAMES = ('latest', 'latest.pth', 'latest.txt')
MAX_FILE_BYTES = 1 << 30  # the writer holds one file in memory at a time

logger = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint that was asked for is missing, incomplete, damaged, or does not fit."""


def checkpoint_name(step: int) -> str:
    """Directory name of the checkpoint after ``step`` completed iterations."""
    return f'iter_{step}'


def step_of(path: Path) -> int | None:
    """The number of completed iterations that a checkpoint's directory name states; None for other names."""
    match = re.fullmatch(r'iter_(\d+)', path.name)
    return int(match[1]) if match else None


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Directories named like checkpoints in ``run_dir``, newest first, valid or not."""
    if not run_dir.is_dir():
        return []
    found = [path for path in run_dir.iterdir() if path.is_dir() and step_of(path) is not None]
    return sorted(found, key=step_of, reverse=True)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, after checking that it is complete and that every file has the stated size.

    Raises:
        CheckpointError: There is no manifest, it cannot be read, or a file is missing or has another size.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding='utf-8'))
        if manifest['format'] != FORMAT:
            raise CheckpointError(f'{path / MANIFEST} has format {manifest["format"]!r}, expected {FORMAT!r}')
        if manifest['version'] > FORMAT_VERSION:
            raise CheckpointError(
                f'{path} has format version {manifest["version"]}, this installation reads up to {FORMAT_VERSION}: '
                'update LakonLab'
            )
        files = {name: (int(entry['size']), str(entry['sha256'])) for name, entry in manifest['files'].items()}
    except FileNotFoundError as error:
        raise CheckpointError(f'{path} has no {MANIFEST}: it is no complete checkpoint') from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f'{path / MANIFEST} is damaged ({error})') from error
    for name, (size, _) in files.items():
        file = path / name
        if Path(name).is_absolute() or '..' in Path(name).parts:
            raise CheckpointError(f'{path / MANIFEST} names a file outside of the checkpoint: {name}')
        if not file.is_file():
            raise CheckpointError(f'{path} is incomplete: {name} is missing')
        if file.stat().st_size != size:
            raise CheckpointError(f'{file} is damaged: it has {file.stat().st_size} bytes, the manifest states {size}')
    return manifest


def content_digest(path: Path, part: str | None = None) -> str:
    """What identifies the content of a checkpoint, wherever it lies and however it is named.

    Args:
        path: The checkpoint's directory.
        part: Only the tensors of this part (``model``, ``optimizer``); None for everything.

    Returns:
        SHA-256 of the names and checksums that the manifest states, in hexadecimal.

    Raises:
        CheckpointError: See :func:`read_manifest`.
    """
    files = read_manifest(path)['files']
    lines = [
        f'{name} {files[name]["sha256"]}\n' for name in sorted(files) if part is None or name.startswith(f'{part}/')
    ]
    return hashlib.sha256(''.join(lines).encode()).hexdigest()


def verify(path: Path) -> dict[str, Any]:
    """Check size and checksum of every file of a checkpoint.

    Returns:
        Its manifest.

    Raises:
        CheckpointError: The checkpoint is missing, incomplete or damaged.
    """
    manifest = read_manifest(path)
    for name, entry in manifest['files'].items():
        if sha256_of(path / name) != entry['sha256']:
            raise CheckpointError(f'{path / name} is damaged: its checksum is not the one in the manifest')
    return manifest


def find_checkpoint(path: str | Path) -> Path | None:
    """Resolve a path to a verified checkpoint.

    Args:
        path: A checkpoint's directory (also spelt ``iter_<N>.pth``), a run's directory, or ``latest``, ``latest.pth``
            or ``latest.txt`` in a run's directory; the last two mean the newest valid checkpoint of the run.

    Returns:
        The checkpoint's directory, or None if there is none.

    Raises:
        CheckpointError: The named checkpoint is damaged, or a run has checkpoints of which none is valid.
    """
    text = str(path)
    if '://' in text:
        raise CheckpointError(f'checkpoint {text!r}: only local paths can be read')
    path = Path(text).expanduser()
    if path.name in LATEST_NAMES and not path.is_dir():
        return _newest_valid(path.parent)
    if path.suffix == '.pth' and not path.exists():
        path = path.with_suffix('')
    if path.is_file():
        raise CheckpointError(f'{path} is a file, but a checkpoint is a directory that holds a {MANIFEST}')
    if not path.is_dir():
        return None
    if step_of(path) is not None or (path / MANIFEST).exists():
        verify(path)
        return path
    return _newest_valid(path)


def _newest_valid(run_dir: Path) -> Path | None:
    candidates = list_checkpoints(run_dir)
    problems = []
    for path in candidates:
        try:
            verify(path)
        except (CheckpointError, OSError) as error:
            problems.append(str(error))
            continue
        for problem in problems:
            logger.warning('%s; falling back to %s', problem, path)
        return path
    if candidates:
        raise CheckpointError(
            f'none of the {len(candidates)} checkpoints in {run_dir} is valid: {"; ".join(problems)}. Restore one of '
            'them, or move the directory away to start from the beginning.'
        )
    return None


def require_checkpoint(path: str | Path) -> Path:
    """Like :func:`find_checkpoint`, for a checkpoint that must exist.

    Raises:
        CheckpointError: There is no such checkpoint, or it is damaged.
    """
    found = find_checkpoint(path)
    if found is None:
        path = Path(path)
        parent = path.parent if path.name in LATEST_NAMES or step_of(path.with_suffix('')) is not None else path
        there = ', '.join(candidate.name for candidate in list_checkpoints(parent)) or 'none'
        raise CheckpointError(f'checkpoint {str(path)!r} does not exist (checkpoints in {parent}: {there})')
    return found


def tensor_info(checkpoint: Path, part: str) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Name -> (shape, dtype) of every tensor of a part, without reading the tensors; empty if there is no such part."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    if not (checkpoint / part).is_dir():
        return {}
    entries = HuggingFaceStorageReader(str(checkpoint / part)).read_metadata().state_dict_metadata
    return {name: (entry.size, entry.properties.dtype) for name, entry in entries.items()}


def read_tensors(checkpoint: Path, part: str, into: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Read tensors of a checkpoint that :func:`find_checkpoint` returned.

    Args:
        checkpoint: The checkpoint's directory.
        part: ``model`` or ``optimizer``.
        into: Tensors to fill in place, by name; they may be sharded differently from the saved ones. None for new
            tensors on the CPU, all of them.

    Returns:
        The filled tensors.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    if into is None:
        info = tensor_info(checkpoint, part)
        into = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in info.items()}
    tensors = dict(into)
    if tensors:
        _silence_single_process_notice()
        reader = dcp.HuggingFaceStorageReader(str(checkpoint / part))
        try:
            dcp.load(tensors, storage_reader=reader, no_dist=not torch.distributed.is_initialized())
        except CheckpointException as error:
            raise CheckpointError(f'reading {checkpoint / part} failed: {_first_failure(error)}') from error
    return tensors


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint holds beside tensors: the plain data that was given to :func:`write_checkpoint`."""
    return json.loads((checkpoint / STATE).read_text(encoding='utf-8'))


def load_model_state(path: str | Path) -> dict[str, Tensor]:
    """The saved model tensors of a checkpoint, on the CPU, verified.

    Args:
        path: As in :func:`find_checkpoint`.

    Raises:
        CheckpointError: There is no such checkpoint, or it is damaged.
    """
    return read_tensors(require_checkpoint(path), 'model')


def write_checkpoint(
    run_dir: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    config_text: str = '',
) -> Path:
    """Write a checkpoint and publish it in one step; a failure leaves nothing under the final name.

    Args:
        run_dir: Directory of the run; made if needed.
        step: Completed iterations.
        tensors: Part -> name -> tensor, on the CPU and not changed by anyone until this returns.
        state: Everything else, plain data.
        config_text: The resolved config of the run.

    Returns:
        The published directory.

    Raises:
        CheckpointError: Writing failed; the message names the reason.
    """
    final = run_dir / checkpoint_name(step)
    temporary = None
    try:
        temporary = temporary_directory(final)
        for part, entries in tensors.items():
            _write_tensors(temporary / part, entries)
        write_json(temporary / STATE, state)
        files = {
            path.relative_to(temporary).as_posix(): {'size': path.stat().st_size, 'sha256': sha256_of(path)}
            for path in sorted(temporary.rglob('*'))
            if path.is_file()
        }
        manifest = {
            'format': FORMAT,
            'version': FORMAT_VERSION,
            'step': step,
            'time': time.strftime('%Y-%m-%dT%H:%M:%S%z'),
            'versions': _versions(),
            'files': files,
            'config': config_text,
        }
        write_json(temporary / MANIFEST, manifest)
        publish_directory(temporary, final)
    except Exception as error:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f'saving {final} failed: {type(error).__name__}: {error}. Checkpoints saved before are untouched; free '
            'space or fix the permissions of the directory, or choose another one with checkpoint_config.out_dir, and '
            'run again.'
        ) from error
    return final


def _write_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    folder.mkdir()
    if not tensors:
        return
    file_of, file, file_bytes = {}, 1, 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if file_bytes and file_bytes + size > MAX_FILE_BYTES:
            file, file_bytes = file + 1, 0
        file_of[name] = file
        file_bytes += size
    _silence_single_process_notice()
    writer = dcp.HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=file_of, save_distributed=True)
    try:
        dcp.save(dict(tensors), storage_writer=writer, no_dist=not torch.distributed.is_initialized())
    except CheckpointException as error:  # a BaseException, which callers would not expect
        raise _first_failure(error) from error


def _silence_single_process_notice() -> None:
    """Saving from one process is what a run without a launcher means; torch warns of it at every save."""
    warnings.filterwarnings('ignore', message='torch.distributed is disabled, unavailable or uninitialized')


def _first_failure(error: BaseException) -> BaseException:
    """The error that one of the processes raised, without the stack traces that torch puts around it."""
    return next(iter(error.failures.values()))[0]


def _versions() -> dict[str, str]:
    versions = {'python': platform.python_version(), 'torch': torch.__version__}
    for package in ('lakonlab', 'safetensors'):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # run from a source tree that is not installed
            versions[package] = 'unknown'
    return versions
