"""The table of schemes, and what each can do."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path

from lakonlab.storage.backend import Backend
from lakonlab.storage.errors import StorageError
from lakonlab.storage.paths import LOCAL, scheme_of

READ, WRITE, LIST, PUBLISH = 'read', 'write', 'list', 'publish'


@dataclass(frozen=True)
class Scheme:
    """One kind of paths.

    Args:
        backend: Module and class that serve it.
        abilities: Of ``read``, ``write``, ``list``, and ``publish``: a file is seen whole or not at all.
        has_own_cache: Whether a library keeps local copies, of directories too, which it finds again without a network.
    """

    backend: str
    abilities: frozenset[str]
    has_own_cache: bool = False

    def make(self) -> Backend:
        """Import and make the backend; it holds no state."""
        module, _, name = self.backend.partition(':')
        return getattr(importlib.import_module(module), name)()


SCHEMES: dict[str, Scheme] = {
    LOCAL: Scheme('lakonlab.storage.local_files:LocalFiles', frozenset({READ, WRITE, LIST, PUBLISH})),
    's3': Scheme('lakonlab.storage.s3:S3Files', frozenset({READ, WRITE, LIST, PUBLISH})),
    'huggingface': Scheme('lakonlab.storage.hub:HubFiles', frozenset({READ, LIST}), has_own_cache=True),
    'http': Scheme('lakonlab.storage.web:WebFiles', frozenset({READ})),
    'https': Scheme('lakonlab.storage.web:WebFiles', frozenset({READ})),
}


def named(schemes: list[str]) -> str:
    """Schemes as a user knows them."""
    return ', '.join('local paths' if scheme == LOCAL else f'{scheme}://' for scheme in schemes)


def require(path: str | Path, *abilities: str, setting: str) -> None:
    """Refuse a path whose scheme cannot do what is needed, without a network.

    Args:
        path: The path.
        *abilities: Of ``read``, ``write``, ``list``, ``publish``.
        setting: Config key or option that names it, for the message.

    Raises:
        StorageError: The scheme is unknown, or lacks one of the abilities.
    """
    scheme = scheme_of(path)
    fitting = [name for name, entry in SCHEMES.items() if entry.abilities.issuperset(abilities)]
    if scheme not in fitting:
        what = {READ: 'read', WRITE: 'written', LIST: 'listed', PUBLISH: 'published to'}
        missing = [
            what[ability] for ability in abilities if scheme not in SCHEMES or ability not in SCHEMES[scheme].abilities
        ]
        prefix = f'{setting}: ' if setting else ''
        raise StorageError(
            f'{prefix}{str(path)!r}: {scheme}:// cannot be {" or ".join(missing)}; expected one of {named(fitting)}'
        )


def can(path: str | Path, *abilities: str) -> bool:
    """Whether the scheme of a path is known and has abilities."""
    scheme = SCHEMES.get(scheme_of(path))
    return scheme is not None and scheme.abilities.issuperset(abilities)


def has_own_cache(path: str | Path) -> bool:
    """Whether local copies of a path are kept by a library of its own."""
    scheme = SCHEMES.get(scheme_of(path))
    return scheme is not None and scheme.has_own_cache


def backend_of(path: str | Path, ability: str = READ) -> Backend:
    """What serves a path.

    Raises:
        StorageError: The scheme is unknown or lacks the ability.
    """
    require(path, ability, setting='')
    return SCHEMES[scheme_of(path)].make()
