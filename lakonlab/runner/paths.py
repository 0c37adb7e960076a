"""Which places a run may read from and write to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lakonlab.config.errors import ConfigError
from lakonlab.storage.local import is_remote


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


def require_local_paths(cfg: Mapping[str, Any], options: Mapping[str, str | None]) -> None:
    """Apply :func:`require_local` to every directory that a config and a command line name.

    Args:
        cfg: The config, with ``work_dir``.
        options: Options of the command line that name checkpoints.

    Raises:
        ConfigError: One of them is not local.
    """
    require_local(cfg['work_dir'], 'work_dir')
    require_local((cfg.get('checkpoint_config') or {}).get('out_dir'), 'checkpoint_config.out_dir')
    for number, entry in enumerate(cfg.get('evaluation') or ()):
        require_local(entry.get('viz_dir'), f'evaluation[{number}].viz_dir')
    for setting, path in {**options, **{key: cfg.get(key) for key in ('resume_from', 'load_from')}}.items():
        require_local(path, setting, 'read')
