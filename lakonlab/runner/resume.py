"""Where a run starts: at the beginning, from weights, or where it was interrupted."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lakonlab.storage.checkpoint import (
    LATEST_NAMES,
    CheckpointError,
    find_checkpoint,
    list_checkpoints,
    require_checkpoint,
    step_of,
    verify,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StartingPoint:
    """What a run starts from.

    Args:
        checkpoint: A verified checkpoint, or None for the initial weights.
        mode: ``resume`` restores everything, ``weights`` the model only, ``fresh`` nothing.
        reason: How it was chosen, for the log.
    """

    checkpoint: Path | None
    mode: Literal['resume', 'weights', 'fresh']
    reason: str


def find_starting_point(
    run_dir: Path,
    *,
    resume_from: str | None = None,
    configured_resume_from: str | None = None,
    load_from: str | None = None,
    auto_resume: bool = True,
) -> StartingPoint:
    """Choose what a run starts from.

    Args:
        run_dir: The run's own checkpoint directory.
        resume_from: Checkpoint named on the command line; it must exist.
        configured_resume_from: ``resume_from`` of the config; it must exist, unless it means the newest checkpoint of
            this very run, which may have none yet.
        load_from: ``load_from`` of the config: weights for a run that has no checkpoint yet; must exist.
        auto_resume: Whether to look for the run's own newest checkpoint where nothing else is named.

    Raises:
        CheckpointError: What must exist does not, or is damaged; or the run's directory holds checkpoints later than
            the one named.
    """
    own_latest = False
    if resume_from is None and configured_resume_from is not None:
        path = Path(configured_resume_from).expanduser()
        parent = path.parent if path.name in LATEST_NAMES else path
        own_latest = parent.absolute() == run_dir.absolute()
    named = resume_from or (None if own_latest else configured_resume_from)
    if named:
        checkpoint = require_checkpoint(named)
        _refuse_later_checkpoints(run_dir, checkpoint, named)
        source = 'the command line' if resume_from else 'resume_from of the config'
        return StartingPoint(checkpoint, 'resume', f'named by {source}')
    if own_latest or auto_resume:
        checkpoint = find_checkpoint(run_dir)
        if checkpoint is not None:
            return StartingPoint(checkpoint, 'resume', f'the newest of this run in {run_dir}')
    if load_from:
        return StartingPoint(require_checkpoint(load_from), 'weights', 'load_from of the config')
    return StartingPoint(None, 'fresh', f'no checkpoint of this run in {run_dir}')


def _refuse_later_checkpoints(run_dir: Path, checkpoint: Path, named: str) -> None:
    step = step_of(checkpoint)
    later = [path for path in list_checkpoints(run_dir) if step is not None and step_of(path) > step]
    if later:
        raise CheckpointError(
            f'{named!r} is checkpoint {checkpoint}, but {run_dir} already holds later ones (up to {later[0].name}), '
            'which the next automatic resume would prefer. To go on from the newest, do not name a checkpoint; to go '
            'back, move the later ones away or give this run another name (work_dir).'
        )


def set_aside_later(run_dir: Path, step: int) -> None:
    """Rename checkpoints later than the one a run resumed from; they are damaged ones that were passed over.

    Args:
        run_dir: The run's checkpoint directory.
        step: Where the run resumed.

    Raises:
        CheckpointError: One of them is valid, so another process saved it since the starting point was chosen.
    """
    for path in list_checkpoints(run_dir):
        if step_of(path) > step:
            if _is_valid(path):
                raise CheckpointError(f'{path} was saved by another process meanwhile; run the same command again')
            number = 0
            while (target := path.with_name(f'damaged_{path.name}.{number}')).exists():
                number += 1
            path.rename(target)
            logger.warning('the damaged checkpoint %s was set aside as %s', path, target.name)


def _is_valid(path: Path) -> bool:
    try:
        verify(path)
    except CheckpointError:
        return False
    return True
