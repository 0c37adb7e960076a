"""Checkpoints: directories of safetensors files, committed by a manifest.

``<run>/iter_<N>/`` holds one folder of tensors per part (``model``, ``optimizer``), ``state.json`` with everything that
is not a tensor, and ``manifest.json``, written last: format, iteration, library versions, the config's text, and size
and SHA-256 of every file. What has no valid manifest is no checkpoint.

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
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lakonlab.ranks import ALONE, Ranks
from lakonlab.storage.local import publish_directory, sha256_of, temporary_directory, write_json
from lakonlab.storage.pieces import Pieces

FORMAT = 'lakonlab-checkpoint'
FORMAT_VERSION = 2
MANIFEST = 'manifest.json'
STATE = 'state.json'
LATEST_NAMES = ('latest', 'latest.pth', 'latest.txt')

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
    published = {step_of(path.with_suffix('')): path for path in run_dir.glob('iter_*.pth') if path.is_file()}
    published.pop(None, None)
    if published:
        newest = published[max(published)]
        raise CheckpointError(
            f'{run_dir} holds checkpoints in the published layout only. Import the newest, with '
            f'`{import_command(newest)}`, and the run goes on from it; or move them away to start from the beginning.'
        )
    return None


def import_command(path: Path) -> str:
    """The command that makes a checkpoint, in the same directory, of a published ``.pth`` file."""
    return f'python tools/import_checkpoint.py {shlex.quote(str(path))} {shlex.quote(str(path.parent))} --config CONFIG'


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
    from lakonlab.storage.safetensors_storage import tensors_in

    return tensors_in(checkpoint / part) if (checkpoint / part).is_dir() else {}


def read_pieces(checkpoint: Path, part: str, into: Mapping[str, Pieces]) -> None:
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
        load_pieces(into, checkpoint / part)
    except CheckpointException as error:
        raise CheckpointError(f'reading {checkpoint / part} failed: {_first_failure(error)}') from error


def read_tensors(checkpoint: Path, part: str) -> dict[str, Tensor]:
    """Read all tensors of a part, whole, to the CPU.

    Args:
        checkpoint: Directory of a checkpoint that :func:`find_checkpoint` returned.
        part: ``model`` or ``optimizer``.

    Raises:
        CheckpointError: A tensor cannot be read.
    """
    info = tensor_info(checkpoint, part)
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in info.items()}
    read_pieces(checkpoint, part, {name: Pieces.whole(tensor) for name, tensor in tensors.items()})
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
    tensors: Mapping[str, Mapping[str, Tensor | Pieces]],
    state: Mapping[str, Any],
    config_text: str = '',
    name: str | None = None,
    ranks: Ranks = ALONE,
    extra: Callable[[Path], object] | None = None,
) -> Path:
    """Write a checkpoint and publish it in one step; a failure leaves nothing under the final name.

    Every process writes what it is asked to of what it holds; tensors that several hold are shared out among them. The
    main process commits when the files of all are on the disk.

    Args:
        run_dir: Directory of the run, the same for all processes; made if needed.
        step: Completed iterations.
        tensors: Part -> name -> what this process holds, on the CPU and not changed by anyone until this returns.
        state: Everything else, plain data; that of the main process counts.
        config_text: The resolved config of the run.
        name: Name of the directory; None for that of the step.
        ranks: The processes.
        extra: Called by the main process with the unpublished directory, to add files made from what is there.

    Returns:
        The published directory.

    Raises:
        CheckpointError: Writing failed in one of the processes; the message names the reason.
    """
    final = run_dir / (name or checkpoint_name(step))
    temporary = None
    try:
        temporary = ranks.on_main(lambda: _begin(final, tensors))
        files: dict[str, dict[str, Any]] = {}
        for part, entries in tensors.items():
            ranks.together(partial(_require_folder, temporary / part))
            _write_pieces(temporary / part, entries, ranks)
        own = ranks.together(lambda: _records(temporary, f'*/rank_{ranks.rank:05d}_*'))
        for records in ranks.gather(own) or ():
            files.update(records)
        if extra is not None:
            files.update(ranks.on_main(lambda: _records_of_extra(temporary, extra)))
        ranks.on_main(lambda: _commit(temporary, final, step, state, config_text, files))
    except Exception as error:
        if temporary is not None and ranks.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise ranks.common(
            CheckpointError(
                f'saving {final} failed: {type(error).__name__}: {error}. Checkpoints saved before are untouched; free '
                'space or fix the permissions of the directory, or choose another one with checkpoint_config.out_dir, '
                'and run again.'
            )
        ) from error
    return final


def _begin(final: Path, parts: Iterable[str]) -> Path:
    temporary = temporary_directory(final)
    try:
        for part in parts:
            (temporary / part).mkdir()
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return temporary


def _require_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(
            f'{folder} was made by the main process and is not seen by this one: checkpoint_config.out_dir must be on '
            'a file system that all nodes share'
        )


def _records(folder: Path, pattern: str) -> dict[str, dict[str, Any]]:
    return {
        path.relative_to(folder).as_posix(): {'size': path.stat().st_size, 'sha256': sha256_of(path)}
        for path in sorted(folder.glob(pattern))
        if path.is_file()
    }


def _records_of_extra(temporary: Path, extra: Callable[[Path], object]) -> dict[str, dict[str, Any]]:
    before = set(_files(temporary))
    extra(temporary)
    added = {path.relative_to(temporary).as_posix() for path in _files(temporary) if path not in before}
    return {name: record for name, record in _records(temporary, '**/*').items() if name in added}


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob('*') if path.is_file())


def _commit(
    temporary: Path,
    final: Path,
    step: int,
    state: Mapping[str, Any],
    config_text: str,
    files: Mapping[str, Mapping[str, Any]],
) -> None:
    write_json(temporary / STATE, state)
    manifest = {
        'format': FORMAT,
        'version': FORMAT_VERSION,
        'step': step,
        'time': time.strftime('%Y-%m-%dT%H:%M:%S%z'),
        'versions': _versions(),
        'files': dict(sorted({**files, **_records(temporary, STATE)}.items())),
        'config': config_text,
    }
    write_json(temporary / MANIFEST, manifest)
    publish_directory(temporary, final)


def _write_pieces(folder: Path, entries: Mapping[str, Tensor | Pieces], ranks: Ranks) -> None:
    from torch.distributed.checkpoint.api import CheckpointException

    from lakonlab.storage.safetensors_storage import save_pieces

    pieces = {name: value if isinstance(value, Pieces) else Pieces.whole(value) for name, value in entries.items()}
    if ranks.world_size == 1 and not pieces:
        return
    _silence_single_process_notice()
    try:
        save_pieces(pieces, folder, ranks.rank, ranks.world_size, ranks.group)
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
