"""Paths as text: their scheme, their parts. Nothing here looks at a file or needs a network.

A path may be local, ``s3://bucket/key``, ``huggingface://organisation/repository[@revision]/path`` or ``http(s)://``.
``tmp:path`` and ``file://path`` are local paths. Any of them may end in ``#sha256=<64 hexadecimal digits>``, the
checksum of the file, which downloads are verified against.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path, PurePosixPath

from lakonlab.storage.errors import StorageError

#: Scheme of local paths.
LOCAL = 'file'
#: Prefix of published configs for files that are to be staged in memory; they are read where they are.
STAGED = 'tmp:'
_SCHEME = re.compile(r'([A-Za-z][A-Za-z0-9+.-]+):/+')
_DIGEST = re.compile(r'#sha256=([0-9A-Fa-f]{64})$')


def scheme_of(path: str | Path) -> str:
    """``file`` for a local path, else what stands before ``://``, in lower case."""
    match = _SCHEME.match(str(path).removeprefix(STAGED))
    return match[1].lower() if match else LOCAL


def is_remote(path: str | Path) -> bool:
    """Whether a path names a place that is not in the local file system, like ``s3://bucket/run``."""
    return scheme_of(path) != LOCAL


def without_scheme(path: str | Path) -> str:
    """What follows ``://`` in the normal spelling of a remote path: a bucket with a key, a repository."""
    return normal(path).partition('://')[2]


def split_digest(path: str | Path) -> tuple[str, str | None]:
    """A path without the checksum at its end, and that checksum in lower case; None if it states none."""
    text = str(path)
    match = _DIGEST.search(text)
    return (text[: match.start()], match[1].lower()) if match else (text, None)


def normal(path: str | Path) -> str:
    """One spelling for each path: without prefix of a local one, checksum, or slash at the end.

    A URL that went through :class:`~pathlib.Path`, which takes away one of its slashes, gets it back.
    """
    text, _ = split_digest(str(path).removeprefix(STAGED))
    scheme = scheme_of(text)
    if scheme == LOCAL:
        return str(Path(text.removeprefix('file://')).expanduser())
    rest = text[_SCHEME.match(text).end() :]
    return f'{scheme}://{rest if "?" in rest else rest.rstrip("/")}'


def as_local(path: str | Path) -> Path:
    """A local path, with the user's directory in place of ``~``."""
    return Path(normal(path))


def join(path: str | Path, *names: str) -> str:
    """A path below another one.

    Args:
        path: A directory of any scheme.
        *names: What is below it, each with or without slashes inside.

    Raises:
        StorageError: A name leads out of the directory.
    """
    text = normal(path)
    for name in names:
        if PurePosixPath(name).is_absolute() or '..' in PurePosixPath(name).parts:
            raise StorageError(f'{name!r} is not in its folder, {text!r}')
    if not is_remote(text):
        return str(Path(text, *names))
    head, query = _without_query(text)
    return posixpath.join(head, *names) + query


def parent_of(path: str | Path) -> str:
    """The directory that a file or directory is in."""
    text = normal(path)
    if not is_remote(text):
        return str(Path(text).parent)
    head, query = _without_query(text)
    scheme, _, rest = head.partition('://')
    return f'{scheme}://{posixpath.dirname(rest) or rest}{query}'


def name_of(path: str | Path) -> str:
    """The last part of a path."""
    text = normal(path)
    return Path(text).name if not is_remote(text) else posixpath.basename(_without_query(text)[0])


def sibling(path: str | Path, name: str) -> str:
    """The path of a file in the same directory as another one.

    Raises:
        StorageError: The name leads out of the directory.
    """
    return join(parent_of(path), name)


def _without_query(text: str) -> tuple[str, str]:
    if not text.startswith(('http://', 'https://')):
        return text, ''
    head, mark, query = text.partition('?')
    return head.rstrip('/'), mark + query
