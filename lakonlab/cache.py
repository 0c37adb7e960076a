"""Where files are kept that can be made or downloaded again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> Path:
    """Folder of downloads and compiled kernels: ``$LAKONLAB_CACHE_DIR``, by default ``~/.cache/lakonlab``."""
    return Path(os.environ.get('LAKONLAB_CACHE_DIR') or Path.home() / '.cache' / 'lakonlab')
