"""What frozen parts that come from other libraries have in common: where they are, and how they are planned.

On the meta device, where a run is only planned, nothing is read or downloaded: of a local folder the modules are built
from their configs without memory; of what is remote nothing is known, so the part is empty and says so.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from lakonlab.models.architecture.freezing import parse_dtype
from lakonlab.models.architecture.loading import PretrainedError
from lakonlab.storage.errors import StorageError
from lakonlab.storage.fetch import fetch
from lakonlab.storage.paths import is_remote, normal, without_scheme
from lakonlab.storage.schemes import LIST, READ, has_own_cache, require

logger = logging.getLogger(__name__)

Loaded = TypeVar('Loaded')


class PretrainedPart(nn.Module):
    """A part of a model that another library loads.

    Args:
        freeze: Whether its parameters get no gradient.
        eval_mode: Whether it stays in evaluation mode.

    Attributes:
        torch_dtype: Dtype of its weights.
    """

    #: Parameters of the published part, for plans of what is not downloaded.
    published_parameters: int | None = None

    def __init__(self, freeze: bool = True, eval_mode: bool = True, torch_dtype: str = 'float32'):
        super().__init__()
        self.torch_dtype = parse_dtype(torch_dtype, 'torch_dtype')
        self.freeze = freeze
        self.eval_mode = eval_mode

    def prepare(self) -> None:
        """Freeze and set the mode; the last step of a constructor."""
        if self.freeze:
            self.requires_grad_(False)
        if self.eval_mode:
            self.eval()

    def train(self, mode: bool = True) -> PretrainedPart:
        """Set the mode, unless it is always evaluation."""
        return super().train(mode and not self.eval_mode)


def is_planned() -> bool:
    """Whether modules are built without memory, on the meta device."""
    return torch.get_default_device().type == 'meta'


def local_folder(name_or_path: str) -> Path | None:
    """The folder that a name stands for, if it is a local one."""
    folder = Path(name_or_path).expanduser()
    return folder if folder.is_dir() else None


def repository(name_or_path: str | None, argument: str = 'model_name_or_path') -> str:
    """What the loaders of other libraries are given: a folder or the name of a repository.

    Args:
        name_or_path: A local folder, ``organisation/repository`` or ``huggingface://organisation/repository``, both
            with ``@revision`` if wanted, or a folder of another scheme that can be listed, such as ``s3://bucket/name``.
        argument: Name of the argument, for messages.

    Raises:
        PretrainedError: It is neither.
    """
    if not name_or_path:
        raise PretrainedError(f'{argument} is missing: name a folder or a repository of the hub')
    is_on_hub = has_own_cache(name_or_path)
    if is_remote(name_or_path) and not is_on_hub:
        try:
            require(name_or_path, READ, LIST, setting=argument)
        except StorageError as error:
            raise PretrainedError(str(error)) from error
        return normal(name_or_path)
    name = without_scheme(name_or_path) if is_on_hub else str(name_or_path).rstrip('/')
    if local_folder(name) is not None:
        return str(local_folder(name))
    if name.count('/') != 1 or name.startswith(('.', '/', '~')):
        raise PretrainedError(
            f'{argument}={name_or_path!r} is no folder (working directory {str(Path.cwd())!r}) and no repository of '
            "the hub, which would read 'organisation/repository'"
        )
    return name


def obtain_parts(name: str, only: Collection[str] | None, revision: str | None) -> tuple[str, str | None]:
    """What :func:`repository` gave, ready for the loaders of other libraries.

    Args:
        name: The name or folder; what is neither local nor on the hub is downloaded.
        only: Subfolders that are needed; None for all.
        revision: Revision that the config names.

    Returns:
        Local folder or ``organisation/repository``, and the revision.

    Raises:
        PretrainedError: It cannot be downloaded, or two revisions are named.
    """
    if is_remote(name):
        try:
            return str(fetch(name, only=only)), revision
        except StorageError as error:
            raise PretrainedError(str(error)) from error
    stem, mark, named = name.rpartition('@')
    if not mark or local_folder(name) is not None:
        return name, revision
    if revision not in (None, named):
        raise PretrainedError(f'{name!r} and revision={revision!r} name two revisions; leave out one of them')
    return stem, named


def load_part(load: Callable[[], Loaded], what: str) -> Loaded:
    """Call a loader of another library.

    Args:
        load: The loader.
        what: The arguments that say what is loaded, for messages.

    Raises:
        PretrainedError: It fails; the message begins with ``what``.
    """
    try:
        return load()
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        first = (str(error).strip() or repr(error)).splitlines()[0]
        raise PretrainedError(
            f'{what} cannot be loaded: {type(error).__name__}: {first}. Check the name and the folder; without a '
            'network, download the repository elsewhere and name the local folder.'
        ) from error


def read_json(path: Path, what: str) -> dict[str, Any]:
    """A JSON file of a saved model.

    Raises:
        PretrainedError: It is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding='utf-8'))
    except FileNotFoundError as error:
        raise PretrainedError(f'{what}: there is no {path}') from error
    except ValueError as error:
        raise PretrainedError(f'{what}: {path} is damaged: {error}') from error


def note_unknown(what: str) -> None:
    """Say that nothing is known of a part that is only planned."""
    logger.info('%s is remote: its size is not known before it is downloaded', what)
