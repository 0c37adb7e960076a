"""Which places a run may read from and write to."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lakonlab.config.errors import ConfigError
from lakonlab.storage.errors import StorageError
from lakonlab.storage.paths import is_remote, name_of
from lakonlab.storage.remote_path import AnyPath, as_path
from lakonlab.storage.schemes import LIST, PUBLISH, READ, WRITE, require
from lakonlab.storage.writable import require_writable

logger = logging.getLogger('lakonlab.config')


def require_place(path: str | Path | None, setting: str, *abilities: str) -> None:
    """Refuse a path whose scheme cannot do what is needed, without a network.

    Args:
        path: The path; None is fine.
        setting: What names it, for the message.
        *abilities: See :func:`~lakonlab.storage.schemes.require`.

    Raises:
        ConfigError: The scheme is unknown, or lacks one of the abilities.
    """
    try:
        if path is not None:
            require(path, *abilities, setting=setting)
    except StorageError as error:
        raise ConfigError(str(error)) from error


def run_directory(out_dir: str | None, work_dir: str, mirror: str | None = None) -> AnyPath:
    """Where a run's checkpoints go: ``<out_dir>/<name of work_dir>``, or ``work_dir`` itself if that is ``out_dir``.

    Args:
        out_dir: ``checkpoint_config.out_dir``; None for ``checkpoints``.
        work_dir: Directory of the logs.
        mirror: The copy of that, which counts as ``work_dir`` too.

    Raises:
        ConfigError: It is in a place that cannot be written to.
    """
    require_place(out_dir, 'checkpoint_config.out_dir', READ, WRITE, LIST, PUBLISH)
    out, work = as_path('checkpoints' if out_dir is None else out_dir), as_path(work_dir)
    same = [work.absolute(), *(() if mirror is None else (as_path(mirror),))]
    return out if out.absolute() in same else out / work.absolute().name


def settle_work_dir(cfg: Any) -> None:
    """Make ``work_dir`` local: of a remote one, ``work_dirs/<its name>`` is written to and copied there.

    Args:
        cfg: The config, with ``work_dir``; gets ``work_dir`` and ``work_dir_mirror``.

    Raises:
        ConfigError: Both are remote.
    """
    if not is_remote(cfg.work_dir):
        return
    if cfg.get('work_dir_mirror') is not None:
        raise ConfigError(
            f'work_dir={cfg.work_dir!r} and work_dir_mirror={cfg.work_dir_mirror!r}: a remote work_dir is a local one '
            'with a copy there, so only one of the two can be remote; name a local work_dir, or leave out the mirror'
        )
    cfg.work_dir_mirror = cfg.work_dir.rstrip('/')
    cfg.work_dir = str(Path('work_dirs') / name_of(cfg.work_dir))


def places_written(cfg: Mapping[str, Any]) -> dict[str, str]:
    """Setting -> every directory of a config that a run writes to, in the order of their importance."""
    out_dir = (cfg.get('checkpoint_config') or {}).get('out_dir')
    places = {
        'checkpoint_config.out_dir': out_dir,
        'work_dir': cfg.get('work_dir'),
        'work_dir_mirror': cfg.get('work_dir_mirror'),
    }
    for number, entry in enumerate(cfg.get('evaluation') or ()):
        places[f'evaluation[{number}].viz_dir'] = entry.get('viz_dir') if entry.get('viz_num') != 0 else None
    return {setting: str(path) for setting, path in places.items() if path is not None}


def check_places(cfg: Mapping[str, Any], options: Mapping[str, str | None], planning: bool = False) -> None:
    """Apply :func:`require_place` to every directory that a config and a command line name.

    Args:
        cfg: The config, with ``work_dir``.
        options: Options of the command line that name checkpoints.
        planning: Whether the run is only planned, so that an impossible place is worth a warning.

    Raises:
        ConfigError: One of them is impossible, and the run is more than a plan.
    """
    read = {**options, **{key: cfg.get(key) for key in ('resume_from', 'load_from')}}
    uses = [(path, setting, (READ, WRITE, LIST, PUBLISH)) for setting, path in places_written(cfg).items()]
    uses += [(path, setting, (READ, LIST)) for setting, path in read.items()]
    for path, setting, abilities in uses:
        try:
            require_place(path, setting, *abilities)
        except ConfigError as error:
            if not planning:
                raise
            logger.warning('config: %s', error)


def require_writable_places(cfg: Mapping[str, Any], *settings: str) -> None:
    """Write to every remote directory that a run will write to, so that it fails before it has cost anything.

    Args:
        cfg: The config, with ``work_dir``.
        *settings: Only these; none for all of :func:`places_written`.

    Raises:
        OSError: One of them cannot be written to; the message names its setting.
    """
    for setting, path in places_written(cfg).items():
        if is_remote(path) and (not settings or setting in settings):
            require_writable(path, setting)
