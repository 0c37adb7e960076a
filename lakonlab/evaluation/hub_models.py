"""Loading models of the transformers library for metrics: whole or not at all, and with a digest for the protocol."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lakonlab.storage.fetch import fetch
from lakonlab.storage.local import sha256_of
from lakonlab.storage.paths import as_local, is_remote, without_scheme
from lakonlab.storage.schemes import has_own_cache

NO_WEIGHTS = (RuntimeError, AttributeError, KeyError, TypeError, ValueError, EOFError, pickle.UnpicklingError)
"""What reading and loading a file raises that holds no weights, or others."""
WEIGHT_SUFFIXES = ('.safetensors', '.bin')
SETTING_SUFFIXES = ('.json', '.jinja', '.model', '.txt')
"""Of configurations, tokenizers and processors."""


def hub_name(path: str) -> str:
    """The name by which transformers finds a model: a repository of the hub, or a local folder; others are downloaded.

    Args:
        path: A folder of any scheme, or ``organisation/repository``.
    """
    if has_own_cache(path):
        return without_scheme(path).strip('/')
    if is_remote(path):
        return str(fetch(path))
    return str(as_local(path)) if as_local(path).exists() else path


def loaded_whole(kind: type, name: str, argument: str, **options: Any) -> nn.Module:
    """A pretrained model all of whose weights are in its files.

    Args:
        kind: Class of the model.
        name: See :func:`hub_name`.
        argument: Config key it comes from, for messages.
        **options: Of ``from_pretrained``.

    Raises:
        ValueError: Weights are missing, or of other shapes.
        OSError: There is no such model.
    """
    try:
        model, found = kind.from_pretrained(name, output_loading_info=True, **options)
    except RuntimeError as error:  # shapes that differ
        reason = str(error).partition('\n')[0]
        raise ValueError(f'{argument}={name!r} does not hold a {kind.__name__}: {reason}') from error
    missing = sorted(found['missing_keys']) + sorted(str(key) for key in found.get('mismatched_keys', ()))
    if missing:
        some = ', '.join(missing[:4])
        raise ValueError(
            f'{argument}={name!r} does not hold a {kind.__name__}: it lacks {len(missing)} tensors ({some})'
        )
    return model


def digest_of(name: str, model: Any = None, suffixes: Sequence[str] = WEIGHT_SUFFIXES) -> str:
    """What tells the files of a model from others: SHA-256 over their names and contents.

    Args:
        name: See :func:`hub_name`; what it names must have been loaded already.
        model: What was loaded from it, which knows the commit of a repository.
        suffixes: Of the files that count.

    Raises:
        FileNotFoundError: There are no such files.
    """
    folder = Path(name)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        commit = getattr(getattr(model, 'config', None), '_commit_hash', None)
        folder = Path(snapshot_download(name, revision=commit, local_files_only=True))
    found = [path for path in sorted(folder.iterdir()) if path.suffix in suffixes and path.is_file()]
    if suffixes == WEIGHT_SUFFIXES and any(path.suffix == '.safetensors' for path in found):
        found = [path for path in found if path.suffix == '.safetensors']  # which are loaded, whatever else is there
    if not found:
        raise FileNotFoundError(f'{folder} has no files that end in {", ".join(suffixes)}')
    return hashlib.sha256(json.dumps([[path.name, sha256_of(path)] for path in found]).encode()).hexdigest()
