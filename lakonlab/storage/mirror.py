"""A copy of a directory of logs in another place, kept up to date while they are written."""

from __future__ import annotations

import logging
from pathlib import Path

from lakonlab.storage import files
from lakonlab.storage.publisher import MANIFEST

CHUNK_BYTES = 1 << 22

logger = logging.getLogger(__name__)


class Mirror:
    """Copies what has changed in a local directory.

    Args:
        local: The directory, written by one process.
        remote: URL of the copy.
    """

    def __init__(self, local: Path, remote: str):
        self.local, self.remote = local, remote
        self._copied: dict[str, tuple[int, int]] = {}

    def fetch(self) -> list[str]:
        """Fetch the files that a run adds to or reads, where the copy is ahead: on another machine, for example.

        Returns:
            Names of the JSON files at the top of the copy that were missing here, or shorter.
        """
        fetched = []
        for name in files.list_names(self.remote):
            target, source = self.local / name, files.join(self.remote, name)
            if not name.endswith('.json') or not files.is_file(source):
                continue
            if not target.is_file() or target.stat().st_size < files.size_of(source):
                files.write_bytes(target, files.read_bytes(source))
                fetched.append(name)
        return fetched

    def update(self) -> list[str]:
        """Copy the files that have changed since the last time, but no checkpoints.

        A checkpoint is whole or not at all where ``checkpoint_config.out_dir`` says, and is removed there when its time
        has come; copied file by file, it would be neither.

        Returns:
            Their names.

        Raises:
            OSError: One cannot be copied; the next call tries it again.
        """
        changed = []
        names = [info.name for info in files.list_files(self.local)]
        checkpoints = tuple(name.removesuffix(MANIFEST) for name in names if name.endswith(f'/{MANIFEST}'))
        for name in names:
            if name.startswith(checkpoints):
                continue
            path = self.local / name
            entry = path.stat()
            facts = entry.st_size, entry.st_mtime_ns
            if self._copied.get(name) == facts:
                continue
            self._copy(path, files.join(self.remote, name), entry.st_size)
            self._copied[name] = facts
            changed.append(name)
        return changed

    @staticmethod
    def _copy(path: Path, target: str, size: int) -> None:
        """Copy the first ``size`` bytes; what is appended meanwhile is for the next time."""
        with open(path, 'rb') as source, files.open_write(target, size) as stream:
            while size > 0 and (content := source.read(min(CHUNK_BYTES, size))):
                stream.write(content)
                size -= len(content)
