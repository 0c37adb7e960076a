"""From a weights file to a network: read, remap, load strictly.

:func:`read_weights` finds and reads the tensors, a network's ``remap_pretrained`` (pure functions) renames and reshapes
them, :func:`load_strictly` refuses whatever does not fit. Nothing here unpickles objects.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor, nn

from lakonlab.storage import files
from lakonlab.storage.errors import StorageError
from lakonlab.storage.fetch import fetch, require_known_scheme
from lakonlab.storage.paths import is_remote, normal, split_digest
from lakonlab.storage.remote_path import AnyPath
from lakonlab.storage.schemes import LIST, can, has_own_cache

logger = logging.getLogger(__name__)

SAFETENSORS_SUFFIXES = ('.safetensors',)
PICKLED_SUFFIXES = ('.pth', '.pt', '.bin', '.ckpt')
INDEX_SUFFIX = '.index.json'
#: Names of weights in a folder of the diffusers or transformers library, best first.
FOLDER_NAMES = tuple(
    stem + suffix + index
    for suffix in ('.safetensors', '.bin')
    for stem in ('diffusion_pytorch_model', 'model', 'pytorch_model')
    for index in (INDEX_SUFFIX, '')
)
#: Where a training checkpoint holds the network, best first.
CHECKPOINT_PREFIXES = ('diffusion_ema.denoising.', 'diffusion.denoising.')
#: Keys under which published training checkpoints hold the tensors, best first.
STATE_KEYS = ('state_dict', 'ema', 'model')


class PretrainedError(RuntimeError):
    """Weights that cannot be read, or do not fit the network they are meant for."""


def locate_weights(path: str, key: str = 'pretrained') -> Path | str:
    """Find what a config names, without reading or downloading it.

    Args:
        path: A ``.safetensors`` or ``.pth``/``.pt``/``.bin`` file; the ``.index.json`` of a sharded one; a folder of
            the diffusers or transformers library; one of our checkpoints: its directory, the run's directory, or
            ``latest.pth`` in that; or the URL of any of these, see ``docs/storage.md``.
        key: Config key that names it, for messages.

    Returns:
        The local file or the directory of the checkpoint; the URL of what is remote.

    Raises:
        FileNotFoundError: There is nothing there.
        PretrainedError: It is of a kind that cannot be read.
    """
    try:
        require_known_scheme(path)
        if is_remote(path):
            return path
        local = fetch(path)
    except StorageError as error:
        raise PretrainedError(f'{key}: {error}') from error
    return _locate_local(local, path, key)


def _locate_local(local: Path, path: str, key: str) -> Path:
    if local.is_file():
        if local.suffix not in SAFETENSORS_SUFFIXES + PICKLED_SUFFIXES and not local.name.endswith(INDEX_SUFFIX):
            kinds = ', '.join((*SAFETENSORS_SUFFIXES, *PICKLED_SUFFIXES, INDEX_SUFFIX))
            raise PretrainedError(
                f'{key}={path!r} has the suffix {local.suffix!r}; expected one of {kinds}, '
                'or the directory of a checkpoint or of a saved model'
            )
        return local
    for name in FOLDER_NAMES:
        if (local / name).is_file():
            return local / name
    from lakonlab.storage.checkpoint import CheckpointError, find_checkpoint

    try:
        found = find_checkpoint(local)
    except CheckpointError as error:
        raise PretrainedError(f'{key}={path!r} cannot be used: {error}') from error
    if found is None and local.is_dir():
        raise PretrainedError(f'{key}={path!r} is a folder without weights{_advice(local)}')
    if found is None:
        raise FileNotFoundError(
            f'{key}={path!r} does not exist (working directory {str(Path.cwd())!r}); '
            f'train or download those weights first, or correct the config key `{key}`'
        )
    return found


def _advice(folder: Path) -> str:
    """What a user who named this folder may have meant."""
    children = sorted(child for child in folder.iterdir() if not child.name.startswith('.'))
    inner = [child.name for child in children if any((child / name).is_file() for name in FOLDER_NAMES)]
    if inner:
        return f'; its subfolders {", ".join(inner)} hold some: name one of them'
    names = ', '.join(child.name for child in children[:8]) or 'nothing'
    return f': expected {FOLDER_NAMES[1]}, {FOLDER_NAMES[3]}, their indices, or checkpoints of a run; found {names}'


def obtain_weights(path: str, key: str = 'pretrained') -> AnyPath:
    """Find what a config names, and download it if it is a remote file.

    Args:
        path: See :func:`locate_weights`.
        key: Config key that names it, for messages.

    Returns:
        The local file, of sharded weights their index; or the directory of the checkpoint, wherever it is.

    Raises:
        FileNotFoundError: There is nothing there.
        PretrainedError: It is of a kind that cannot be read, or cannot be downloaded.
    """
    return _obtain(path, key)[0]


def _obtain(path: str, key: str) -> tuple[AnyPath, str]:
    """Like :func:`obtain_weights`; beside it, the path next to which the shards of an index are."""
    found = locate_weights(path, key)
    if isinstance(found, Path):
        return found, str(found)
    try:
        if has_own_cache(path):  # of a folder all is downloaded, so the shards of an index are there
            local = _locate_local(fetch(path), path, key)
            return local, path if _is_index(path) else str(local)
        place = normal(path)
        if can(path, LIST) and not files.is_file(place):
            return _in_remote_folder(place, path, key)
        local = fetch(path)
    except StorageError as error:
        raise PretrainedError(f'{key}: {error}') from error
    return _locate_local(local, path, key), place


def _in_remote_folder(folder: str, path: str, key: str) -> tuple[AnyPath, str]:
    """Weights, or a checkpoint, in a folder that can be listed; a run may hold much more than what is needed."""
    from lakonlab.storage.checkpoint import CheckpointError, find_checkpoint, find_file

    names = files.list_names(folder)
    for name in FOLDER_NAMES:
        if name in names:
            return fetch(files.join(folder, name)), files.join(folder, name)
    try:
        inner = find_file(folder) if folder.endswith(SAFETENSORS_SUFFIXES) else None
        if inner is not None:  # weights for inference that a checkpoint brings along
            return fetch(inner), inner
        found = find_checkpoint(folder)
    except CheckpointError as error:
        raise PretrainedError(f'{key}={path!r} cannot be used: {error}') from error
    if found is None and names:
        raise PretrainedError(
            f'{key}={path!r} is a folder without weights: expected {FOLDER_NAMES[1]}, {FOLDER_NAMES[3]}, their '
            f'indices, or checkpoints of a run; found {", ".join(names[:8])}'
        )
    if found is None:
        raise FileNotFoundError(f'{key}={path!r} does not exist; correct the config key `{key}`')
    return found, folder


def read_weights(path: str, key: str = 'pretrained') -> dict[str, Tensor]:
    """Read the network's tensors from a file, its shards, or a checkpoint of a run, downloading what is remote.

    Of a training checkpoint the EMA network is taken if there is one, else the student.

    Args:
        path: See :func:`locate_weights`.
        key: Config key that names it, for messages.

    Returns:
        Name -> tensor on the CPU, names relative to the network.

    Raises:
        FileNotFoundError: There is nothing there.
        PretrainedError: It cannot be read.
    """
    found, place = _obtain(path, key)
    if not isinstance(found, Path) or found.is_dir():
        from lakonlab.storage.checkpoint import CheckpointError, load_model_state

        try:
            state = load_model_state(found)
        except (CheckpointError, StorageError) as error:
            raise PretrainedError(f'{key}={path!r} cannot be used: {error}') from error
    elif _is_index(found.name):
        state = _read_shards(found, place, path, key)
    else:
        state = _read_file(found, path, key)
    return select_network(state)


def _read_shards(index: Path, place: str, path: str, key: str) -> dict[str, Tensor]:
    """All tensors that an index lists, from the files beside the place that it is from."""
    named = _named(index, path, key)
    try:
        by_file: dict[str, list[str]] = {}
        for name, file in json.loads(index.read_text(encoding='utf-8'))['weight_map'].items():
            by_file.setdefault(str(file), []).append(name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PretrainedError(f'{named} is no index of sharded weights: {error!r}') from error
    state: dict[str, Tensor] = {}
    for file, names in by_file.items():
        try:
            shard = fetch(files.sibling(place, file))
        except StorageError as error:
            raise PretrainedError(f'{named}: {error}') from error
        if not shard.is_file():
            raise PretrainedError(f'{named} lists {file}, which is not beside it: download all its shards')
        tensors = _read_file(shard, path, key)
        missing = [name for name in names if name not in tensors]
        if missing:
            raise PretrainedError(
                f'{named} says that {file} holds {missing[0]!r}'
                f'{f" and {len(missing) - 1} more tensors" if len(missing) > 1 else ""}, which it does not: index and '
                'shards are not of the same model'
            )
        state.update({name: tensors[name] for name in names})
    return state


def _is_index(path: str) -> bool:
    return split_digest(path)[0].partition('?')[0].endswith(INDEX_SUFFIX)


def _named(file: Path, path: str, key: str) -> str:
    """For messages: what the user named, and the file it led to."""
    return f'{key}={path!r}' if str(file) == path else f'{key}={path!r}: {str(file)!r}'


def _read_file(file: Path, path: str, key: str) -> dict[str, Tensor]:
    named = _named(file, path, key)
    again = '; if the server has another file there, delete this one and run again' if is_remote(path) else ''
    if file.suffix in SAFETENSORS_SUFFIXES:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(file)
        except SafetensorError as error:
            raise PretrainedError(f'{named} is not a readable safetensors file: {error}{again}') from error
    try:
        # some published checkpoints keep their command line beside the tensors, as a namespace of plain values
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(file, map_location='cpu', weights_only=True)
    except Exception as error:  # torch raises many kinds for damaged or unsafe files
        raise PretrainedError(
            f'{named} cannot be read as a file of plain tensors ({type(error).__name__}: {error}); '
            f'files that hold other Python objects are refused, convert them to .safetensors{again}'
        ) from error
    return _unwrap(state, named)


def _unwrap(state: object, named: str) -> dict[str, Tensor]:
    for name in STATE_KEYS:
        if isinstance(state, Mapping) and isinstance(state.get(name), Mapping):
            state = state[name]
            break
    if not isinstance(state, Mapping):
        raise PretrainedError(f'{named} holds a {type(state).__name__}, expected a dict of tensors')
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise PretrainedError(f'{named} holds no tensors; its keys are {sorted(map(str, state))[:10]}')
    return tensors


def select_network(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Pick the tensors of the network from the state of a whole model, and drop the prefix of their names.

    Args:
        state: Name -> tensor.

    Returns:
        The EMA network's tensors if there are any, else the student's, else all.
    """
    for prefix in CHECKPOINT_PREFIXES:
        selected = {name[len(prefix) :]: tensor for name, tensor in state.items() if name.startswith(prefix)}
        if selected:
            return selected
    return dict(state)


def load_strictly(
    network: nn.Module,
    state: Mapping[str, Tensor],
    where: str,
    ignored: Sequence[str] = (),
    allowed_missing: Sequence[str] = (),
    assign: bool = False,
    key: str = 'pretrained',
    name_of: Callable[[str], str] = lambda name: name,
) -> None:
    """Copy tensors into a network, refusing anything that does not fit.

    Args:
        network: Receives the values, in its own dtypes and on its own devices.
        state: Name -> tensor.
        where: What the tensors come from, for messages.
        ignored: Names, or patterns with ``*``, that ``state`` may have beyond the network's.
        allowed_missing: Names, or patterns with ``*``, that ``state`` may lack.
        assign: Whether the tensors become those of the network instead of being copied, as networks without memory
            need it.
        key: Config key that names the tensors, for messages.
        name_of: Name of a tensor in the network -> its name in messages.

    Raises:
        PretrainedError: Names are missing, unexpected, or have another shape, or tensors of the network are left
            without values; all are named.
    """
    own = network.state_dict()
    state = {name: tensor for name, tensor in state.items() if name in own or not _matches(name, ignored)}
    missing = [name_of(name) for name in own if name not in state and not _matches(name, allowed_missing)]
    unexpected = [name for name in state if name not in own]
    mismatched = [
        f'{name_of(name)}: {tuple(state[name].shape)} in the file, {tuple(own[name].shape)} in the network'
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    problems = []
    for title, names in (('missing', missing), ('unexpected', unexpected), ('of another shape', mismatched)):
        if names:
            problems.append(f'  {len(names)} {title}:\n' + ''.join(f'    {name}\n' for name in names))
    if problems:
        raise PretrainedError(
            f'{key}={where!r} does not fit {type(network).__name__}:\n'
            + ''.join(problems)
            + f'  Check that the config key `{key}` names weights of this architecture and that the arguments of '
            'the network (layers, heads, channels, classes) are those they were trained with.'
        )
    network.load_state_dict(state, strict=not allowed_missing, assign=assign)
    tensors = [*network.named_parameters(), *network.named_buffers()]
    empty = [name for name, tensor in tensors if tensor.is_meta]
    if empty:
        raise PretrainedError(
            f'{key}={where!r} leaves {len(empty)} tensors of {type(network).__name__} without values: '
            f'{", ".join(empty[:8])}'
        )


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def load_pretrained(network: nn.Module, path: str, source=None) -> None:
    """Load weights into a network; a network on the meta device only has them located.

    Args:
        network: A :class:`~lakonlab.models.architecture.network.Network`.
        path: See :func:`locate_weights`.
        source: Random source of what the file does not determine; None for torch's global state.

    Raises:
        FileNotFoundError: There is nothing at ``path``.
        PretrainedError: It cannot be read or does not fit.
    """
    parameters = list(network.parameters())
    if parameters and all(parameter.is_meta for parameter in parameters):
        locate_weights(path)
        return
    state = network.remap_pretrained(read_weights(path), source)
    network.load_published(state, path)
    logger.info('%s: loaded %d tensors from %s', type(network).__name__, len(state), path)
