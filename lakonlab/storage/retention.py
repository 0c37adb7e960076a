"""Which checkpoints of a run are kept."""

from __future__ import annotations

import logging

from lakonlab.storage.checkpoint import list_checkpoints, step_of
from lakonlab.storage.publisher import publisher_of
from lakonlab.storage.remote_path import AnyPath

logger = logging.getLogger(__name__)


def steps_to_remove(steps: list[int], max_keep: int, must_save_interval: int | None) -> list[int]:
    """The checkpoints that may go, oldest first.

    Args:
        steps: Completed iterations of all checkpoints that exist.
        max_keep: How many of the newest are kept, at least 1; -1 keeps all.
        must_save_interval: Multiples of it are kept for ever; None for no such rule.

    Returns:
        Steps to remove: never the newest, never a multiple of ``must_save_interval``.
    """
    if max_keep < 0:
        return []
    kept_for_ever = {step for step in steps if must_save_interval and step % must_save_interval == 0}
    newest = set(sorted(steps, reverse=True)[: max(max_keep, 1)])
    return sorted(set(steps) - kept_for_ever - newest)


def prune(run_dir: AnyPath, committed: int, max_keep: int, must_save_interval: int | None) -> list[int]:
    """Remove the checkpoints of a run that :func:`steps_to_remove` names; call only after a newer one is published.

    A directory that cannot be removed, or only in part, is reported and tried again after the next save.

    Args:
        run_dir: Directory of the run.
        committed: Step of the checkpoint that was just published; later ones are not this run's and are left alone.
        max_keep: As in :func:`steps_to_remove`.
        must_save_interval: As in :func:`steps_to_remove`.

    Returns:
        The removed steps.
    """
    publisher = publisher_of(run_dir)
    removed = []
    try:
        by_step = {step_of(path): path for path in list_checkpoints(run_dir) if step_of(path) <= committed}
        directories = [path for path in run_dir.iterdir() if step_of(path) is not None]
    except OSError as error:
        logger.warning('old checkpoints in %s could not be listed, so none is removed (%s)', run_dir, error)
        return []
    for step in steps_to_remove(list(by_step), max_keep, must_save_interval):
        try:
            publisher.remove(by_step[step])
        except OSError as error:
            logger.warning('the old checkpoint %s could not be removed (%s)', by_step[step], error)
            continue
        removed.append(step)
    for path in directories:
        if step_of(path) not in by_step and step_of(path) < committed:
            try:
                publisher.tidy(path)
            except OSError as error:
                logger.warning('what is left of %s could not be removed (%s)', path, error)
    return removed
