"""Finds and reads the adapters that :meth:`PiFlowPipelineMixin.load_piflow_adapter` is given."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from lakonlab.models.architecture.adapters import read_adapter
from lakonlab.models.architecture.loading import PretrainedError
from lakonlab.pipelines.recipe import RECIPE_KEY, Recipe
from lakonlab.storage import files
from lakonlab.storage.fetch import fetch
from lakonlab.storage.paths import is_remote

logger = logging.getLogger(__name__)

CONFIG_FILE = 'config.json'
STEM, SUFFIX = 'diffusion_pytorch_model', '.safetensors'
HUB_OPTIONS = ('revision', 'token', 'cache_dir', 'force_download', 'local_files_only')


class AdapterError(ValueError):
    """An adapter that cannot be read, or does not fit the pipeline it is loaded into."""


@dataclass(frozen=True)
class PiFlowAdapter:
    """Content of an adapter's folder."""

    where: str
    """What the user named, for messages."""
    lora: dict[str, Tensor]
    """Low-rank matrices, ``<layer>.lora_A.weight`` (rank, in) and ``<layer>.lora_B.weight`` (out, rank)."""
    tensors: dict[str, Tensor]
    """Tensors that replace those of the base, and those of the policy head."""
    policy: dict[str, Any] = field(default_factory=dict)
    """Type and arguments of the policy, as far as the file tells."""
    recipe: Recipe | None = None
    """How it is to be sampled; None if the file does not tell."""
    config: dict[str, Any] = field(default_factory=dict)
    """``config.json``."""


def weights_name(variant: str | None = None) -> str:
    """Name of the file with the weights."""
    return f'{STEM}.{variant}{SUFFIX}' if variant else STEM + SUFFIX


def load_adapter_files(
    path: str | Path,
    subfolder: str | None = None,
    target: str = 'transformer',
    variant: str | None = None,
    **hub_options: Any,
) -> PiFlowAdapter:
    """Read an adapter from a local folder, any place that has a scheme, or a repository of the Hugging Face hub.

    Args:
        path: Local folder, URL of a folder, or name of a repository.
        subfolder: Folder in it.
        target: Name of the pipeline's module, which may precede the names of the tensors.
        variant: Middle part of the name of the file, such as ``'fp16'``.
        **hub_options: Of :func:`huggingface_hub.hf_hub_download`, see :data:`HUB_OPTIONS`; ``proxies`` of its older
            versions must be None.

    Raises:
        AdapterError: There is no such adapter, or it cannot be read.
    """
    if hub_options.pop('proxies', None):
        raise ValueError('proxies: the client of the hub takes them from the environment: set HTTPS_PROXY')
    unknown = sorted(set(hub_options) - set(HUB_OPTIONS))
    if unknown:
        raise TypeError(f'load_piflow_adapter has no argument {unknown[0]!r}; it has {", ".join(HUB_OPTIONS)}')
    where = f'{path}/{subfolder}' if subfolder else str(path)
    name = weights_name(variant)
    weights = _locate(str(path), subfolder, name, hub_options)
    if weights is None:
        raise AdapterError(f'{where!r} has no {name}{_found(str(path), subfolder)}')
    config_file = _locate(str(path), subfolder, CONFIG_FILE, hub_options)
    if config_file is None:
        raise AdapterError(f'{where!r} has no {CONFIG_FILE} beside {name}, which says what it is an adapter of')
    try:
        config = json.loads(config_file.read_text(encoding='utf-8'))
    except ValueError as error:
        raise AdapterError(f'{where!r}: {CONFIG_FILE} is damaged: {error}') from error
    if not isinstance(config, dict):
        raise AdapterError(f'{where!r}: {CONFIG_FILE} holds a {type(config).__name__}, expected a dict')
    try:
        adapter = read_adapter(str(weights), 'adapter')
        recipe = _recipe_of(weights)
    except (PretrainedError, ValueError, TypeError) as error:
        raise AdapterError(f'{where!r} cannot be read: {error}') from error
    return PiFlowAdapter(
        where,
        _without_prefix(adapter.lora, target),
        _without_prefix(adapter.tensors, target),
        adapter.policy,
        recipe,
        config,
    )


def _without_prefix(tensors: Mapping[str, Tensor], target: str) -> dict[str, Tensor]:
    return {name.removeprefix(f'{target}.'): tensor for name, tensor in tensors.items()}


def _recipe_of(weights: Path) -> Recipe | None:
    from safetensors import safe_open

    with safe_open(weights, framework='pt') as content:
        text = (content.metadata() or {}).get(RECIPE_KEY)
    return None if text is None else Recipe.from_mapping(json.loads(text))


def _locate(path: str, subfolder: str | None, name: str, hub_options: Mapping[str, Any]) -> Path | None:
    """A file of the adapter on the local disk, downloaded if need be; None if there is none."""
    if is_remote(path):
        folder = files.join(path, subfolder) if subfolder else path
        place = files.join(folder, name)
        return fetch(place) if files.is_file(place) else None
    folder = Path(path, subfolder or '')
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    if Path(path).exists() or not _is_repository(path):
        raise AdapterError(f'there is no folder {str(folder)!r}, nor can {path!r} be a repository of the hub')
    return _download(path, subfolder, name, hub_options)


def _is_repository(path: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(path)
    except HFValidationError:
        return False
    return path.count('/') == 1


def _download(repository: str, subfolder: str | None, name: str, options: Mapping[str, Any]) -> Path | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(hf_hub_download(repository, name, subfolder=subfolder or None, **options))
    except LocalEntryNotFoundError as error:
        raise AdapterError(
            f'{repository!r} is no local folder, and {name} of the repository of that name is not in the cache and '
            f'cannot be downloaded: {error}'
        ) from error
    except EntryNotFoundError:
        return None
    except (RepositoryNotFoundError, OSError) as error:
        raise AdapterError(f'{repository!r} is no local folder and cannot be downloaded: {error}') from error


def read_index(path: str | Path, folder: str, name: str, hub_options: Mapping[str, Any]) -> dict[str, Any]:
    """The index of what is beside a pipeline; empty where there is none, or none in the cache and the hub out of reach.

    Args:
        path: What the pipeline was loaded from: a local folder, or a repository.
        folder: In it, with the index and a folder of each name; local ones that the index lacks belong to it too.
        name: Of the index.
        hub_options: See :data:`HUB_OPTIONS`.
    """
    from huggingface_hub.errors import LocalEntryNotFoundError

    inside, file = Path(path, folder), None
    if inside.is_dir():
        file = inside / name if (inside / name).is_file() else None
    elif not Path(path).exists() and _is_repository(str(path)):
        try:
            file = _download(str(path), folder, name, hub_options)
        except AdapterError as error:
            if not isinstance(error.__cause__, LocalEntryNotFoundError):  # the pipeline itself was in the cache
                logger.warning('cannot tell whether there is %s/%s beside the pipeline: %s', folder, name, error)
    index = {} if file is None else json.loads(file.read_text(encoding='utf-8'))
    for child in sorted(inside.iterdir()) if inside.is_dir() else ():
        if child.is_dir():
            index.setdefault(child.name, {})
    return index


def _found(path: str, subfolder: str | None) -> str:
    """What is in a local folder in place of the weights."""
    folder = Path(path, subfolder or '')
    if is_remote(path) or not folder.is_dir():
        return ''
    names = sorted(child.name for child in folder.iterdir())
    pickled = [name for name in names if name.endswith(('.bin', '.pt', '.pth', '.ckpt'))]
    if pickled:
        return f': {pickled[0]} is a pickle, which could execute code; convert it to safetensors'
    inner = [name for name in names if (folder / name / (STEM + SUFFIX)).is_file()]
    if inner:
        return f'; give one of its folders as subfolder: {", ".join(inner)}'
    return f'; found {", ".join(names[:8]) or "nothing"}'
