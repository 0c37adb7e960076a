"""Which places a run may read from and write to."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lakonlab.config.errors import ConfigError
from lakonlab.storage.paths import is_remote

logger = logging.getLogger('lakonlab.config')


def require_local(path: str | Path | None, setting: str, use: str = 'written') -> None:
    """Refuse a directory that is not in the local file system.

    Args:
        path: The directory; None is fine.
        setting: What names it, for the message.
        use: ``written`` or ``read``.

    Raises:
        ConfigError: It has a scheme such as ``s3://``.
    """
    if path is not None and is_remote(path):
        raise ConfigError(
            f'{setting}: only local directories can be {use} in this version; found {str(path)!r}. Name a local '
            f'directory and copy {"its content afterwards" if use == "written" else "the checkpoint there first"}.'
        )


def check_local_paths(cfg: Mapping[str, Any], options: Mapping[str, str | None], planning: bool = False) -> None:
    """Apply :func:`require_local` to every directory that a config and a command line name.

    Args:
        cfg: The config, with ``work_dir``.
        options: Options of the command line that name checkpoints.
        planning: Whether the run is only planned, so that a remote directory is worth a warning.

    Raises:
        ConfigError: One of them is not local, and the run is more than a plan.
    """
    out_dir = (cfg.get('checkpoint_config') or {}).get('out_dir')
    written = {'work_dir': cfg['work_dir'], 'checkpoint_config.out_dir': out_dir}
    for number, entry in enumerate(cfg.get('evaluation') or ()):
        written[f'evaluation[{number}].viz_dir'] = entry.get('viz_dir')
    read = {**options, **{key: cfg.get(key) for key in ('resume_from', 'load_from')}}
    for use, paths in {'written': written, 'read': read}.items():
        for setting, path in paths.items():
            try:
                require_local(path, setting, use)
            except ConfigError as error:
                if not planning:
                    raise
                logger.warning('config: %s', error)
