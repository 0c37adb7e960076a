"""Directories of a local file system are published by a rename."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lakonlab.storage.local import (
    directory_lock,
    publish_directory,
    remove_directory,
    remove_stale_temporaries,
    require_shared,
    restore_replaced,
    stale_replaced,
    temporary_directory,
    write_bytes,
    write_json,
)
from lakonlab.storage.publisher import MANIFEST, Publisher, Record, record_of


class LocalPublisher(Publisher):
    """Publishes by renaming a temporary directory; see the base class."""

    has_folders = False

    def begin(self, final: Path, parts: Iterable[str]) -> Path:
        """See the base class."""
        draft = temporary_directory(final)
        try:
            for part in parts:
                (draft / part).mkdir()
        except OSError:
            shutil.rmtree(draft, ignore_errors=True)
            raise
        return draft

    def require_seen(self, draft: Path, part: str) -> None:
        """See the base class."""
        if not (draft / part).is_dir():
            raise FileNotFoundError(
                f'{draft / part} was made by the main process and is not seen by this one: checkpoint_config.out_dir '
                'must be on a file system that all nodes share'
            )

    def write(self, path: Path, content: bytes) -> Record:
        """See the base class."""
        if not path.parent.is_dir():
            path.parent.mkdir()
        write_bytes(path, content)
        return record_of(content)

    def settle(self, draft: Path, names: Iterable[str]) -> None:
        """See the base class; file systems list what was written."""

    def publish(self, draft: Path, final: Path, manifest: Mapping[str, Any]) -> None:
        """See the base class."""
        write_json(draft / MANIFEST, manifest)
        publish_directory(draft, final)

    def discard(self, draft: Path) -> None:
        """See the base class."""
        shutil.rmtree(draft, ignore_errors=True)

    def is_published(self, path: Path) -> bool:
        """See the base class."""
        return path.is_dir()

    def sizes(self, folder: Path, names: Iterable[str]) -> dict[str, int]:
        """See the base class."""
        return {name: (folder / name).stat().st_size for name in names if (folder / name).is_file()}

    def remove(self, path: Path) -> None:
        """See the base class."""
        remove_directory(path)

    def set_aside(self, path: Path) -> str:
        """See the base class."""
        number = 0
        while (target := path.with_name(f'damaged_{path.name}.{number}')).exists():
            number += 1
        path.rename(target)
        return target.name

    def tidy(self, path: Path) -> list[str]:
        """See the base class; what is to be removed loses its name first, so :meth:`clean` finds it."""
        return []

    def clean(self, parent: Path) -> list[str]:
        """See the base class."""
        return remove_stale_temporaries(parent)

    def restore(self, parent: Path) -> list[str]:
        """See the base class."""
        if not stale_replaced(parent):
            return []
        with directory_lock(parent):
            return restore_replaced(parent)

    @contextlib.contextmanager
    def hold(self, parent: Path) -> Iterator[None]:
        """See the base class."""
        with directory_lock(parent):
            yield None

    def confirm(self, parent: Path, holder: str | None) -> None:
        """See the base class; the kernel takes its lock from nobody."""

    def require_shared(self, path: Path) -> None:
        """See the base class."""
        require_shared(path)
