"""What entries of the section ``evaluation`` are called, and what no two of them may share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lakonlab.storage.remote_path import as_path


class Entry(NamedTuple):
    """An entry, as far as others can be in its way.

    Args:
        key: Where it stands, for messages.
        name: See :func:`entry_name`.
        viz_dir: The folder of images that it names; None for the default, which is its own, or if it writes none.
    """

    key: str
    name: str
    viz_dir: str | None


def entry_name(data: str, prefix: str | None) -> str:
    """What the numbers, best checkpoints and images of an entry are called: ``<data>_<prefix>``, or ``<data>``."""
    return f'{data}_{prefix}' if prefix else data


def prefixed(prefix: str, name: str) -> str:
    """What a number of a metric with a prefix of its own is called: ``<prefix>_<name>``, or ``<name>``."""
    return f'{prefix}_{name}' if prefix else name


def metric_configs(metrics: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None) -> list[Mapping[str, Any]]:
    """The configs of metrics that an entry names: several, a single one, or none."""
    return [metrics] if isinstance(metrics, Mapping) else list(metrics or ())


def run_name(work_dir: str | Path) -> str:
    """What the images of a run are called by default, as its checkpoints are: the name of its ``work_dir``."""
    return Path(work_dir).absolute().name


def images_folder(viz_dir: str | None, run: str, name: str) -> str:
    """Where an entry writes images.

    Args:
        viz_dir: What the entry says; None for the default.
        run: See :func:`run_name`.
        name: See :func:`entry_name`.
    """
    return viz_dir or f'viz/{run}/{name}'


def entries_of(section: Sequence[Any]) -> list[Entry]:
    """The entries of the section of a config; what is no entry at all is left out.

    Args:
        section: The section ``evaluation``.
    """
    found = []
    for number, entry in enumerate(section):
        if isinstance(entry, Mapping):
            name = entry_name(str(entry.get('data', 'val')), entry.get('prefix'))
            viz_dir = entry.get('viz_dir') if entry.get('viz_num') != 0 else None
            found.append(Entry(f'evaluation.{number}', name, viz_dir))
    return found


def clashes(entries: Sequence[Entry]) -> list[str]:
    """What entries share that they must not.

    Args:
        entries: All entries of a run.

    Returns:
        What is wrong, and how to mend it.
    """
    by_name: dict[str, list[str]] = {}
    by_folder: dict[str, list[Entry]] = {}
    for entry in entries:
        by_name.setdefault(entry.name, []).append(entry.key)
        if isinstance(entry.viz_dir, str):
            by_folder.setdefault(str(as_path(entry.viz_dir).absolute()), []).append(entry)
    names = [
        f'{_and(keys)}: found {len(keys)} entries of the name {name!r}, which their numbers, best checkpoints and '
        'images would share; give each a prefix of its own'
        for name, keys in by_name.items()
        if len(keys) > 1
    ]
    folders = [
        f'{_and([entry.key for entry in found])}: found {len(found)} entries with viz_dir={found[0].viz_dir!r}, of '
        'which each would remove the images of the others; give each a folder of its own, or set viz_num=0 where none '
        'are needed'
        for found in by_folder.values()
        if len(found) > 1
    ]
    return names + folders


def _and(keys: Sequence[str]) -> str:
    return ' and '.join(dict.fromkeys(keys))
