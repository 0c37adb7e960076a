"""Directories of object stores are published by their manifest, which is put last.

``iter_8/`` holds ``manifest.json`` and one folder ``data-<16 hexadecimal digits>/`` per attempt to save it, in which
the files lie; the manifest names the folder. Putting one object is atomic, so a reader finds the files of the attempt
before or those of the new one, whole, and never a mixture. Folders that no manifest names are what killed saves left.
"""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from lakonlab.storage import files
from lakonlab.storage.lease import LOCK_FILE, confirm_lease, lease
from lakonlab.storage.publisher import DATA, MANIFEST, Publisher, Record, record_of
from lakonlab.storage.remote_path import RemotePath
from lakonlab.storage.writable import PROBE

DATA_FOLDER = re.compile(r'data-[0-9a-f]{16}')
DATA_FILE = re.compile(rf'[^/]+/{DATA_FOLDER.pattern}/.+')
"""Names of files of checkpoints, relative to the directory of their run."""
SET_ASIDE = re.compile(r'damaged\.(\d+)\.json')
SETTLE_SECONDS = 60.0
"""How long a listing may lack what was written; those of S3 itself never do."""

logger = logging.getLogger(__name__)


class ObjectPublisher(Publisher):
    """Publishes by a manifest; see the base class."""

    has_folders = True

    def begin(self, final: RemotePath, parts: Iterable[str]) -> RemotePath:
        """See the base class; folders come into being with their first file."""
        return final / f'data-{uuid.uuid4().hex[:16]}'

    def require_seen(self, draft: RemotePath, part: str) -> None:
        """See the base class; there is nothing to see before the first file."""

    def write(self, path: RemotePath, content: bytes) -> Record:
        """See the base class."""
        files.write_bytes(str(path), content)
        return record_of(content)

    def settle(self, draft: RemotePath, names: Iterable[str]) -> None:
        """See the base class."""
        deadline, pause = time.monotonic() + SETTLE_SECONDS, 0.1
        while missing := set(names) - {info.name for info in files.list_files(str(draft))}:
            if time.monotonic() > deadline:
                raise files.StorageError(f'{draft} does not list {sorted(missing)[0]}, which was written there')
            time.sleep(pause)
            pause = min(2 * pause, 5.0)

    def publish(self, draft: RemotePath, final: RemotePath, manifest: Mapping[str, Any]) -> None:
        """See the base class; what the manifest before referred to is removed afterwards."""
        try:
            files.write_bytes(str(final / MANIFEST), json.dumps({**manifest, DATA: draft.name}, indent=1).encode())
        except OSError as error:  # the server may have done it, and its answer was lost
            if not _is_named(draft, otherwise=False):
                raise
            logger.warning('%s is published, although its manifest was not written without an error (%s)', final, error)
        try:
            names = [info.name for info in files.list_files(str(final))]
            if _data_folders(names) - {draft.name}:
                _remove_strays(final, names, also_kept=draft.name)
        except OSError as error:  # it is published; the rest is removed when the run starts the next time
            logger.warning('what %s was before could not be removed (%s)', final, error)

    def discard(self, draft: RemotePath) -> None:
        """See the base class."""
        if _is_named(draft, otherwise=True):
            logger.warning('%s stays: the manifest beside it names it, or cannot be read', draft)
            return
        try:
            files.remove_directory(str(draft))
            files.clean_uploads(str(draft))
        except OSError as error:
            logger.warning('what was written to %s could not be removed (%s)', draft, error)

    def is_published(self, path: RemotePath) -> bool:
        """See the base class."""
        return (path / MANIFEST).is_file()

    def sizes(self, folder: RemotePath, names: Iterable[str]) -> dict[str, int]:
        """See the base class; one listing tells most, and what it lacks is asked for by name."""
        listed = {info.name: info.size for info in files.list_files(str(folder))}
        found = {name: listed[name] for name in names if name in listed}
        for name in set(names) - set(found):
            if (folder / name).is_file():
                found[name] = files.size_of(str(folder / name))
        return found

    def remove(self, path: RemotePath) -> None:
        """See the base class; the manifest goes first."""
        files.remove_file(str(path / MANIFEST))
        _remove_strays(path, [info.name for info in files.list_files(str(path))])

    def set_aside(self, path: RemotePath) -> str:
        """See the base class.

        Nothing can be renamed cheaply, so the manifest alone moves, into a file that :meth:`clean` respects.
        """
        names = [info.name for info in files.list_files(str(path))]
        numbers = [int(match[1]) for name in names if (match := SET_ASIDE.fullmatch(name))]
        target = path / f'damaged.{max(numbers, default=-1) + 1}.json'
        folders = sorted(_data_folders(names) - _kept(path, names, with_manifest=False))
        # bytes that are no text come back as they were, with the same way to read them
        text = files.read_bytes(str(path / MANIFEST)).decode('utf-8', 'surrogateescape')
        files.write_bytes(str(target), json.dumps({'folders': folders, MANIFEST: text}, indent=1).encode())
        files.remove_file(str(path / MANIFEST))
        return f'{path.name}/{target.name}'

    def tidy(self, path: RemotePath) -> list[str]:
        """See the base class."""
        return _remove_strays(path, [info.name for info in files.list_files(str(path))])

    def clean(self, parent: RemotePath) -> list[str]:
        """See the base class; unfinished multipart uploads, which a listing does not show, are ended too.

        Only those of files of checkpoints: other runs may lie in the same directory, or the copy of a ``work_dir``.
        """
        files.remove_file(str(parent / PROBE))
        removed = [f'{upload} (unfinished)' for upload in files.clean_uploads(str(parent), DATA_FILE)]
        by_directory: dict[str, list[str]] = {}
        for info in files.list_files(str(parent)):
            directory, slash, name = info.name.partition('/')
            if slash:
                by_directory.setdefault(directory, []).append(name)
        for directory, names in sorted(by_directory.items()):
            removed += [f'{directory}/{folder}' for folder in _remove_strays(parent / directory, names)]
        return removed

    def restore(self, parent: RemotePath) -> list[str]:
        """See the base class; nothing loses its name here."""
        return []

    def hold(self, parent: RemotePath) -> AbstractContextManager[str]:
        """See the base class."""
        return lease(parent)

    def confirm(self, parent: RemotePath, holder: str | None) -> None:
        """See the base class."""
        if holder is not None:
            confirm_lease(parent, holder)

    def require_shared(self, path: RemotePath) -> None:
        """See the base class; every node needs credentials and a way to the store."""
        if not (path / LOCK_FILE).is_file():
            raise files.StorageError(
                f'{path / LOCK_FILE}, which the main process has written, does not exist for this process: '
                'checkpoint_config.out_dir must be the same place with the same credentials on all nodes'
            )


def _remove_strays(directory: RemotePath, names: Iterable[str], also_kept: str | None = None) -> list[str]:
    """Remove folders of files that neither the manifest nor anything set aside refers to."""
    strays = sorted(_data_folders(names) - _kept(directory, names) - {also_kept})
    for folder in strays:
        files.remove_directory(str(directory / folder))
    return strays


def _data_folders(names: Iterable[str]) -> set[str]:
    return {folder for folder in (name.partition('/')[0] for name in names) if DATA_FOLDER.fullmatch(folder)}


def _kept(directory: RemotePath, names: Iterable[str], with_manifest: bool = True) -> set[str]:
    """The folders that are referred to; all, if what refers to them cannot be understood."""
    kept: set[str] = set()
    try:
        for name in names:
            if SET_ASIDE.fullmatch(name):
                kept.update(json.loads((directory / name).read_text())['folders'])
        if with_manifest and (directory / MANIFEST).is_file():  # a listing may lag behind
            kept.add(json.loads((directory / MANIFEST).read_text())[DATA])
    except (ValueError, KeyError, TypeError):
        return _data_folders(names)
    return kept


def _is_named(draft: RemotePath, otherwise: bool) -> bool:
    """Whether the manifest that is visible names a draft; ``otherwise`` if that cannot be found out."""
    manifest = draft.parent / MANIFEST
    try:
        return json.loads(manifest.read_text())[DATA] == draft.name
    except FileNotFoundError:
        return False
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning('%s cannot be read (%s)', manifest, error)
        return otherwise
