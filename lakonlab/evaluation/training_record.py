"""What the evaluations of a run in training found, with protocols: one file in its ``work_dir``."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lakonlab.evaluation.circumstances import circumstances
from lakonlab.evaluation.plain import finite
from lakonlab.storage import files

logger = logging.getLogger('lakonlab.evaluation')

RECORD_FILE = 'evaluations.json'


def record(work_dir: str | Path, iteration: int, result: Mapping[str, Any]) -> None:
    """Add the results of one evaluation, all or nothing.

    What is there of the same evaluation at the same iteration is replaced, and what is of later ones is removed: a run
    that went on from an older checkpoint makes them again. One process writes the file.

    Args:
        work_dir: Directory of the run.
        iteration: Number of completed iterations.
        result: See :meth:`lakonlab.evaluation.hook.GenerativeEvalHook.run`.
    """
    path = Path(work_dir) / RECORD_FILE
    kept = [
        entry
        for entry in _read(path)
        if entry['iteration'] < iteration or (entry['iteration'] == iteration and entry['name'] != result['name'])
    ]
    _write(path, [*kept, finite({'iteration': iteration, **result, 'made': circumstances()})])


def forget_later(work_dir: str | Path, iteration: int) -> None:
    """Remove results of later iterations, which will be made again.

    Args:
        work_dir: Directory of the run.
        iteration: Number of iterations that are completed now.
    """
    path = Path(work_dir) / RECORD_FILE
    found = _read(path)
    kept = [entry for entry in found if entry['iteration'] <= iteration]
    if len(kept) < len(found):
        count = len(found) - len(kept)
        logger.info('%s: %d results after iteration %d, which will be made again, are removed', path, count, iteration)
        _write(path, kept)


def _read(path: Path) -> list[dict[str, Any]]:
    if not files.is_file(path):
        return []
    try:
        entries = json.loads(files.read_text(path))['evaluations']
        if all(isinstance(entry['iteration'], int) and isinstance(entry['name'], str) for entry in entries):
            return entries
        problem = 'an evaluation has no iteration or no name'
    except (ValueError, TypeError, KeyError) as error:
        problem = f'{type(error).__name__}: {error}'
    logger.warning('%s is not readable (%s) and will be replaced', path, problem)
    return []


def _write(path: Path, entries: list[dict[str, Any]]) -> None:
    content = dict(evaluations=entries)
    files.write_text(path, json.dumps(content, indent=1, allow_nan=False, default=str) + '\n')
