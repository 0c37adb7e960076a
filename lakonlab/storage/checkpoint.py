"""Checkpoints: directories of safetensors files, committed by a manifest.

``<run>/iter_<N>/`` holds one folder of tensors per part (``model``, ``optimizer``), ``state.json`` with everything that
is not a tensor, and ``manifest.json``, written last: format, iteration, library versions, the config's text, and size
and SHA-256 of every file. What has no valid manifest is no checkpoint. In an object store the files lie in a folder of
the directory that the manifest names (version 3 of the format; :mod:`lakonlab.storage.publisher` says why), and such a
checkpoint, copied to a disk as it is, is read there too.

Tensors go through torch.distributed.checkpoint, which plans what each process writes and reads, into safetensors files
(:mod:`lakonlab.storage.safetensors_storage`) rather than its default ones: those pickle their index and every tensor,
so reading them safely would need an unpickler restricted to a list of torch's private classes; safetensors cannot hold
code at all, keeps every dtype exactly (scalars, bfloat16, integers, empty tensors), and is read by other programs.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import re
import shlex
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from lakonlab.ranks import ALONE, Ranks
from lakonlab.storage.errors import MissingFileError, StorageError
from lakonlab.storage.pieces import Pieces
from lakonlab.storage.publisher import DATA, MANIFEST, Publisher, Record, publisher_of
from lakonlab.storage.remote_path import AnyPath, as_path, files_below, open_path
from lakonlab.storage.schemes import LIST, READ, require

FORMAT = 'lakonlab-checkpoint'
FORMAT_VERSION = 3
VERSION_WITHOUT_FOLDER = 2
STATE = 'state.json'
LATEST_NAMES = ('latest', 'latest.pth', 'latest.txt')
DEEPEST_FILE = 2
"""Parts of the name of a file of a checkpoint."""
PARALLEL_READS = 4
"""Files of an object store whose checksums are computed at the same time."""

logger = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint that was asked for is missing, incomplete, damaged, or does not fit."""


def checkpoint_name(step: int) -> str:
    """Directory name of the checkpoint after ``step`` completed iterations."""
    return f'iter_{step}'


def step_of(path: AnyPath) -> int | None:
    """The number of completed iterations that a checkpoint's directory name states; None for other names."""
    match = re.fullmatch(r'iter_(\d+)', path.name)
    return int(match[1]) if match else None


def list_checkpoints(run_dir: AnyPath) -> list[AnyPath]:
    """Directories named like checkpoints in ``run_dir``, newest first, valid or not."""
    if not run_dir.is_dir():
        return []
    is_published = publisher_of(run_dir).is_published
    found = [path for path in run_dir.iterdir() if step_of(path) is not None and is_published(path)]
    return sorted(found, key=step_of, reverse=True)


def read_manifest(path: AnyPath) -> dict[str, Any]:
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
        expected = {name: (int(entry['size']), str(entry['sha256'])) for name, entry in manifest['files'].items()}
        folder_name = manifest.get(DATA)
    except FileNotFoundError as error:
        raise CheckpointError(f'{path} has no {MANIFEST}: it is no complete checkpoint') from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f'{path / MANIFEST} is damaged ({error})') from error
    for name in [*expected, *(() if folder_name is None else (str(folder_name),))]:
        if PurePosixPath(name).is_absolute() or '..' in PurePosixPath(name).parts:
            raise CheckpointError(f'{path / MANIFEST} names a file outside of the checkpoint: {name}')
    folder = _data_folder(path, manifest)
    sizes = publisher_of(path).sizes(folder, expected)
    for name, (size, _) in expected.items():
        if name not in sizes:
            raise CheckpointError(f'{path} is incomplete: {name} is missing')
        if sizes[name] != size:
            raise CheckpointError(f'{folder / name} is damaged: it has {sizes[name]} bytes, the manifest states {size}')
    return manifest


def _data_folder(path: AnyPath, manifest: Mapping[str, Any]) -> AnyPath:
    return path / manifest[DATA] if manifest.get(DATA) else path


def _contents(path: AnyPath) -> tuple[AnyPath, list[str]]:
    """Where the files of a checkpoint, or of a draft of one, lie, and their names."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding='utf-8'))
    except FileNotFoundError:
        return path, files_below(path)
    return _data_folder(path, manifest), list(manifest['files'])


def content_digest(path: AnyPath, part: str | None = None) -> str:
    """What identifies the content of a checkpoint, wherever it lies and however it is named.

    Args:
        path: The checkpoint's directory.
        part: Only the tensors of this part (``model``, ``optimizer``); None for everything.

    Returns:
        SHA-256 of the names and checksums that the manifest states, in hexadecimal.

    Raises:
        CheckpointError: See :func:`read_manifest`.
    """
    entries = read_manifest(path)['files']
    lines = [
        f'{name} {entries[name]["sha256"]}\n' for name in sorted(entries) if part is None or name.startswith(f'{part}/')
    ]
    return hashlib.sha256(''.join(lines).encode()).hexdigest()


def verify(path: AnyPath) -> dict[str, Any]:
    """Check size and checksum of every file of a checkpoint.

    Returns:
        Its manifest.

    Raises:
        CheckpointError: The checkpoint is missing, incomplete or damaged.
    """
    manifest = read_manifest(path)
    folder = _data_folder(path, manifest)
    names = list(manifest['files'])
    with ThreadPoolExecutor(1 if isinstance(path, Path) else PARALLEL_READS, thread_name_prefix='verify') as threads:
        for name, digest in zip(names, threads.map(lambda name: _sha256_of(folder / name), names)):
            if digest != manifest['files'][name]['sha256']:
                threads.shutdown(wait=False, cancel_futures=True)
                raise CheckpointError(f'{folder / name} is damaged: its checksum is not the one in the manifest')
    return manifest


def _sha256_of(path: AnyPath, chunk_bytes: int = 1 << 22) -> str:
    digest = hashlib.sha256()
    with open_path(path) as stream:
        while chunk := stream.read(chunk_bytes):
            digest.update(chunk)
    return digest.hexdigest()


def find_checkpoint(path: str | AnyPath) -> AnyPath | None:
    """Resolve a path to a verified checkpoint.

    Args:
        path: A checkpoint's directory (also spelt ``iter_<N>.pth``), a run's directory, or ``latest``, ``latest.pth``
            or ``latest.txt`` in a run's directory; the last two mean the newest valid checkpoint of the run. Of any
            scheme that can be listed.

    Returns:
        The checkpoint's directory, or None if there is none.

    Raises:
        CheckpointError: The named checkpoint is damaged, or a run has checkpoints of which none is valid.
        OSError: The place where it lies cannot be reached.
    """
    try:
        require(path if isinstance(path, Path) else str(path), READ, LIST, setting='checkpoint')
    except StorageError as error:
        raise CheckpointError(str(error)) from error
    path = as_path(path)
    if path.name in LATEST_NAMES and not path.is_dir():
        return _newest_valid(path.parent)
    if path.suffix == '.pth' and not path.exists():
        path = path.with_suffix('')
    if path.is_file():
        raise CheckpointError(
            f'{path} is a file, but a checkpoint is a directory that holds a {MANIFEST}. A training checkpoint in the '
            f'published layout is imported once, with `{import_command(path)}`; then name the directory that it writes'
        )
    if not path.is_dir():
        return None
    if step_of(path) is not None or (path / MANIFEST).exists():
        verify(path)
        return path
    return _newest_valid(path)


def _newest_valid(run_dir: AnyPath) -> AnyPath | None:
    candidates = list_checkpoints(run_dir)
    problems = []
    for path in candidates:
        try:
            verify(path)
        except (CheckpointError, OSError) as error:
            if isinstance(error, StorageError) and not isinstance(error, MissingFileError):
                raise  # nothing is known of the checkpoint: an older one would be taken without need
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
    named = [path for path in (run_dir.iterdir() if run_dir.is_dir() else ()) if path.suffix == '.pth']
    published = {step_of(path.with_suffix('')): path for path in named if path.is_file()}
    published.pop(None, None)
    if published:
        newest = published[max(published)]
        raise CheckpointError(
            f'{run_dir} holds checkpoints in the published layout only. Import the newest, with '
            f'`{import_command(newest)}`, and the run goes on from it; or move them away to start from the beginning.'
        )
    return None


def import_command(path: AnyPath) -> str:
    """The command that makes a checkpoint, in the same directory, of a published ``.pth`` file."""
    return f'python tools/import_checkpoint.py {shlex.quote(str(path))} {shlex.quote(str(path.parent))} --config CONFIG'


def require_checkpoint(path: str | AnyPath) -> AnyPath:
    """Like :func:`find_checkpoint`, for a checkpoint that must exist.

    Raises:
        CheckpointError: There is no such checkpoint, or it is damaged.
    """
    found = find_checkpoint(path)
    if found is None:
        path = as_path(path)
        parent = path.parent if path.name in LATEST_NAMES or step_of(path.with_suffix('')) is not None else path
        there = ', '.join(candidate.name for candidate in list_checkpoints(parent)) or 'none'
        raise CheckpointError(f'checkpoint {str(path)!r} does not exist (checkpoints in {parent}: {there})')
    return found


def _files_of(checkpoint: AnyPath, part: str) -> list[AnyPath]:
    folder, names = _contents(checkpoint)
    return [folder / name for name in sorted(names) if name.startswith(f'{part}/') and name.endswith('.safetensors')]


def tensor_info(checkpoint: AnyPath, part: str) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Name -> (shape, dtype) of every tensor of a part, without reading the tensors; empty if there is no such part."""
    from lakonlab.storage.safetensors_storage import tensors_in

    return tensors_in(_files_of(checkpoint, part))


def read_pieces(checkpoint: AnyPath, part: str, into: Mapping[str, Pieces]) -> None:
    """Fill in place what this process holds, however the saved tensors were divided.

    Args:
        checkpoint: Directory of a checkpoint that :func:`find_checkpoint` returned.
        part: ``model`` or ``optimizer``.
        into: What this process holds, by name.

    Raises:
        CheckpointError: A tensor cannot be read.
    """
    from torch.distributed.checkpoint.api import CheckpointException

    from lakonlab.storage.safetensors_storage import load_pieces

    if not into:
        return
    _silence_single_process_notice()
    try:
        load_pieces(into, _files_of(checkpoint, part))
    except CheckpointException as error:
        raise CheckpointError(f'reading {checkpoint / part} failed: {_first_failure(error)}') from error


def read_tensors(checkpoint: AnyPath, part: str, prefix: str = '') -> dict[str, Tensor]:
    """Read tensors of a part, whole, to the CPU.

    Args:
        checkpoint: Directory of a checkpoint that :func:`find_checkpoint` returned.
        part: ``model`` or ``optimizer``.
        prefix: Only tensors whose names begin with it are read.

    Raises:
        CheckpointError: A tensor cannot be read.
    """
    info = tensor_info(checkpoint, part)
    tensors = {
        name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in info.items() if name.startswith(prefix)
    }
    read_pieces(checkpoint, part, {name: Pieces.whole(tensor) for name, tensor in tensors.items()})
    return tensors


def read_state(checkpoint: AnyPath) -> dict[str, Any]:
    """What a checkpoint holds beside tensors: the plain data that was given to :func:`write_checkpoint`."""
    folder, _ = _contents(checkpoint)
    return json.loads((folder / STATE).read_text(encoding='utf-8'))


def find_file(path: str | AnyPath) -> str | None:
    """Where a file of a checkpoint lies that is named as its manifest does, such as ``<checkpoint>/export/<file>``.

    Args:
        path: The checkpoint's directory, followed by the name in the manifest.

    Returns:
        The path of the file with its checksum, which downloads verify; None if the manifest names no such file.
    """
    path = as_path(path)
    checkpoint, names = path.parent, [path.name]
    while len(names) <= DEEPEST_FILE:
        if (checkpoint / MANIFEST).is_file():
            manifest, name = read_manifest(checkpoint), '/'.join(names)
            entry = manifest['files'].get(name)
            return None if entry is None else f'{_data_folder(checkpoint, manifest) / name}#sha256={entry["sha256"]}'
        checkpoint, names = checkpoint.parent, [checkpoint.name, *names]
    return None


def load_model_state(path: str | AnyPath) -> dict[str, Tensor]:
    """The saved model tensors of a checkpoint, on the CPU, verified.

    Args:
        path: As in :func:`find_checkpoint`.

    Raises:
        CheckpointError: There is no such checkpoint, or it is damaged.
    """
    return read_tensors(require_checkpoint(path), 'model')


def write_checkpoint(
    run_dir: AnyPath,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor | Pieces]],
    state: Mapping[str, Any],
    config_text: str = '',
    name: str | None = None,
    ranks: Ranks = ALONE,
    extra: Callable[[AnyPath, AnyPath], Mapping[str, Record]] | None = None,
    confirm: Callable[[], object] | None = None,
) -> AnyPath:
    """Write a checkpoint and publish it in one step; a failure leaves nothing under the final name.

    Every process writes what it is asked to of what it holds; tensors that several hold are shared out among them. The
    main process commits when the files of all last.

    Args:
        run_dir: Directory of the run, the same for all processes; made if needed.
        step: Completed iterations.
        tensors: Part -> name -> what this process holds, on the CPU and not changed by anyone until this returns.
        state: Everything else, plain data; that of the main process counts.
        config_text: The resolved config of the run.
        name: Name of the directory; None for that of the step.
        ranks: The processes.
        extra: Called by the main process with the unpublished directory and the place where its files will be, to add
            files made from what is there; returns what :meth:`~lakonlab.storage.publisher.Publisher.write` said of
            each, by its name in the directory.
        confirm: Called by the main process just before it publishes, to raise an error if it must not any more.

    Returns:
        The published directory.

    Raises:
        CheckpointError: Writing failed in one of the processes; the message names the reason.
    """
    final = run_dir / (name or checkpoint_name(step))
    publisher = publisher_of(run_dir)
    draft = None
    try:
        draft = ranks.on_main(lambda: publisher.begin(final, tensors))
        own: dict[str, dict[str, Any]] = {}
        for part, entries in tensors.items():
            ranks.together(partial(publisher.require_seen, draft, part))
            own.update(_write_pieces(publisher, draft, part, entries, ranks))
        files: dict[str, dict[str, Any]] = {}
        for records in ranks.gather(own) or ():
            files.update(records)

        def commit() -> None:
            if extra is not None:
                publisher.settle(draft, files)
                files.update(extra(draft, draft if publisher.has_folders else final))
            files[STATE] = publisher.write(draft / STATE, json.dumps(state, indent=1).encode())
            if confirm is not None:
                confirm()
            publisher.publish(draft, final, _manifest(publisher, step, files, config_text))

        ranks.on_main(commit)
    except Exception as error:
        if draft is not None and ranks.is_main:
            publisher.discard(draft)
        raise ranks.common(
            CheckpointError(
                f'saving {final} failed: {type(error).__name__}: {error}. Checkpoints saved before are untouched; free '
                'space or fix the permissions of the directory, or choose another one with checkpoint_config.out_dir, '
                'and run again.'
            )
        ) from error
    return final


def _manifest(
    publisher: Publisher, step: int, files: Mapping[str, Mapping[str, Any]], config_text: str
) -> dict[str, Any]:
    return {
        'format': FORMAT,
        'version': FORMAT_VERSION if publisher.has_folders else VERSION_WITHOUT_FOLDER,
        'step': step,
        'time': time.strftime('%Y-%m-%dT%H:%M:%S%z'),
        'versions': _versions(),
        'files': dict(sorted(files.items())),
        'config': config_text,
    }


def _write_pieces(
    publisher: Publisher, draft: AnyPath, part: str, entries: Mapping[str, Tensor | Pieces], ranks: Ranks
) -> dict[str, dict[str, Any]]:
    from torch.distributed.checkpoint.api import CheckpointException

    from lakonlab.storage.safetensors_storage import save_pieces

    pieces = {name: value if isinstance(value, Pieces) else Pieces.whole(value) for name, value in entries.items()}
    if ranks.world_size == 1 and not pieces:
        return {}
    _silence_single_process_notice()
    records: dict[str, dict[str, Any]] = {}

    def write(name: str, content: bytes) -> None:
        records[f'{part}/{name}'] = publisher.write(draft / part / name, content)

    try:
        save_pieces(pieces, write, ranks.rank, ranks.world_size, ranks.group)
    except CheckpointException as error:  # a BaseException, which callers would not expect
        raise _first_failure(error) from error
    return records


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
