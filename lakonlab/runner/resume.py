"""Where a run starts: at the beginning, from weights, or where it was interrupted."""

from __future__ import annotations

import ast
import logging
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from lakonlab.storage.checkpoint import (
    LATEST_NAMES,
    CheckpointError,
    content_digest,
    find_checkpoint,
    list_checkpoints,
    read_state,
    require_checkpoint,
    step_of,
    verify,
)
from lakonlab.storage.publisher import publisher_of
from lakonlab.storage.remote_path import AnyPath, as_path

logger = logging.getLogger(__name__)

MOST_DIFFERENCES = 20
# where a run lies and what it reports do not change what is trained
UNRELATED_SECTIONS = (
    'work_dir',
    'work_dir_mirror',
    'evaluation',
    'log_config',
    'log_level',
    'resume_from',
    'load_from',
)


@dataclass(frozen=True)
class StartingPoint:
    """What a run starts from.

    Args:
        checkpoint: A verified checkpoint, or None for the initial weights.
        mode: ``resume`` restores everything, ``weights`` the model only, ``fresh`` nothing.
        reason: How it was chosen, for the log.
        named: Whether the user named this very checkpoint, rather than the run finding its own.
        present: Steps of the run's own checkpoints when it was chosen, valid or not; None if nobody looked.
    """

    checkpoint: AnyPath | None
    mode: Literal['resume', 'weights', 'fresh']
    reason: str
    named: bool = False
    present: frozenset[int] | None = None

    def origin(self) -> dict[str, str]:
        """What a run that starts from this checkpoint remembers of it."""
        return {'path': str(self.checkpoint.absolute()), 'digest': content_digest(self.checkpoint)}


def find_starting_point(
    run_dir: AnyPath,
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

    A checkpoint that is named stays the name of the same run: if the run's own newest checkpoint descends from it, the
    run was interrupted and goes on from its own newest.

    Raises:
        CheckpointError: What must exist does not, or is damaged; or the run's directory holds checkpoints later than
            the one named.
    """
    present = frozenset(step_of(path) for path in list_checkpoints(run_dir))
    start = _choose(run_dir, resume_from, configured_resume_from, load_from, auto_resume)
    return replace(start, present=present)


def _choose(
    run_dir: AnyPath,
    resume_from: str | None,
    configured_resume_from: str | None,
    load_from: str | None,
    auto_resume: bool,
) -> StartingPoint:
    own_latest = False
    if resume_from is None and configured_resume_from is not None:
        path = as_path(configured_resume_from)
        parent = path.parent if path.name in LATEST_NAMES else path
        own_latest = parent.absolute() == run_dir.absolute()
    named = resume_from or (None if own_latest else configured_resume_from)
    if named:
        descendant = _newest_descendant(run_dir, named)
        if descendant is not None:
            reason = f'the newest of this run in {run_dir}; it descends from {named}, which was named'
            return StartingPoint(descendant, 'resume', reason)
        checkpoint = require_checkpoint(named)
        _refuse_later_checkpoints(run_dir, checkpoint, named)
        source = 'the command line' if resume_from else 'resume_from of the config'
        return StartingPoint(checkpoint, 'resume', f'named by {source}', named=True)
    if own_latest or auto_resume:
        checkpoint = find_checkpoint(run_dir)
        if checkpoint is not None:
            return StartingPoint(checkpoint, 'resume', f'the newest of this run in {run_dir}')
    if load_from:
        return StartingPoint(require_checkpoint(load_from), 'weights', 'load_from of the config')
    return StartingPoint(None, 'fresh', f'no checkpoint of this run in {run_dir}')


def _newest_descendant(run_dir: AnyPath, named: str) -> AnyPath | None:
    """The run's newest checkpoint if the run was started from the named one, which may be gone by now."""
    if not list_checkpoints(run_dir):
        return None
    origin = find_checkpoint(named)
    newest = find_checkpoint(run_dir)
    if newest is None:
        return None
    started_from = read_state(newest).get('started_from') or ()
    if origin is None:
        path = str(as_path(named).absolute())
        known = {entry['path'] for entry in started_from}
        return newest if path.removesuffix('.pth') in known else None
    digest = content_digest(origin)
    return newest if any(entry['digest'] == digest for entry in started_from) else None


def _refuse_later_checkpoints(run_dir: AnyPath, checkpoint: AnyPath, named: str) -> None:
    step = step_of(checkpoint)
    later = [path for path in list_checkpoints(run_dir) if step is not None and step_of(path) > step]
    if later:
        raise CheckpointError(
            f'{named!r} is checkpoint {checkpoint}, but {run_dir} already holds later ones (up to {later[0].name}), '
            'which the next automatic resume would prefer. To go on from the newest, do not name a checkpoint; to go '
            'back, move the later ones away or give this run another name (work_dir).'
        )


def set_aside_later(run_dir: AnyPath, step: int) -> None:
    """Take checkpoints out of the way that are later than the one a run resumed from: damaged ones, passed over.

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
            name = publisher_of(run_dir).set_aside(path)
            logger.warning('the damaged checkpoint %s was set aside as %s', path, name)


def require_seen(checkpoint: AnyPath, digest: str) -> None:
    """Make sure that this process reads the checkpoint that the main one has chosen.

    Args:
        checkpoint: Its directory.
        digest: :func:`~lakonlab.storage.checkpoint.content_digest` of what the main process sees there.

    Raises:
        CheckpointError: It is not there, or is another one.
    """
    try:
        own = content_digest(checkpoint)
    except CheckpointError as error:
        found = str(error)
    else:
        if own == digest:
            return
        found = 'it is another one'
    raise CheckpointError(
        f'{socket.gethostname()} does not see the checkpoint {checkpoint} as the main process does ({found}): it must '
        'lie where all nodes can read it'
    )


def require_untouched(run_dir: AnyPath, start: StartingPoint) -> None:
    """Make sure that a run's directory is still as it was when its starting point was chosen.

    Args:
        run_dir: The run's checkpoint directory, held by this run now.
        start: The starting point.

    Raises:
        CheckpointError: Another process has saved there meanwhile.
    """
    for path in list_checkpoints(run_dir):
        if start.present is not None and step_of(path) not in start.present and _is_valid(path):
            raise CheckpointError(f'{path} was saved by another process meanwhile; run the same command again')


def require_same_run(
    start: StartingPoint, saved: Mapping[str, Any], present: Mapping[str, Any], optimizers: Mapping[str, str]
) -> None:
    """Compare what a checkpoint recorded with the present run.

    Args:
        start: The checkpoint, and how it was chosen.
        saved: Its state.
        present: ``seed``, ``batch_size``, ``dataset_size`` and ``buckets`` of the present run.
        optimizers: Optimiser key -> class name, of the present run.

    Raises:
        CheckpointError: The optimisers are of another class; or the data or random numbers would differ, and the
            checkpoint was not named by the user.
    """
    for key, kind in (saved.get('optimizer_types') or {}).items():
        if optimizers.get(key, kind) != kind:
            raise CheckpointError(
                f'optimizer[{key!r}].type={optimizers[key]!r}, but {start.checkpoint} holds the state of {kind!r}: set '
                'it back; or start a run of another name (work_dir) from the weights alone, with load_from'
            )
    for key, value in present.items():
        before = saved['data'].get(key)
        if before is None or before == value:  # an imported checkpoint does not know all of them
            continue
        if not start.named:
            raise CheckpointError(
                f'{key} is {value}, it was {before} when {start.checkpoint} was saved, so the run would not be the one '
                'that was interrupted. Set it back; or give the run another name (work_dir); or name the checkpoint '
                f'with --resume-from {start.checkpoint} to go on from it with the new value.'
            )
        logger.warning(
            '%s is %s, it was %s when %s was saved: from here on the run differs from an uninterrupted one',
            key,
            value,
            before,
            start.checkpoint,
        )


def config_differences(before: str, now: str) -> list[str]:
    """What changed between two configs, one line per key, without sections that do not change the training.

    Args:
        before: Text of a resolved config.
        now: Another.

    Returns:
        Lines like ``lr_config.warmup_iters: 10 -> 20``.
    """
    try:
        old, new = config_values(before), config_values(now)
    except SyntaxError as error:  # a value without a literal, which only configs made in Python can hold
        return [f'the two cannot be compared ({error.msg})']
    absent = '(absent)'
    lines = [
        f'{key}: {old.get(key, absent)} -> {new.get(key, absent)}'
        for key in sorted(set(old) | set(new))
        if old.get(key) != new.get(key) and key.split('.')[0] not in UNRELATED_SECTIONS
    ]
    if len(lines) > MOST_DIFFERENCES:
        lines = [*lines[:MOST_DIFFERENCES], f'... and {len(lines) - MOST_DIFFERENCES} more']
    return lines


def config_values(text: str) -> dict[str, str]:
    """The values of a config, which is parsed, never run.

    Args:
        text: Text of a resolved config.

    Returns:
        Dotted key -> source text of its value.

    Raises:
        SyntaxError: A value has no literal, which only configs made in Python can hold.
    """
    values: dict[str, str] = {}
    for statement in ast.parse(text).body:
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            values.update(_leaves(statement.targets[0].id, statement.value))
    return values


def _leaves(path: str, node: ast.expr) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == 'dict':
        items = [(str(keyword.arg), keyword.value) for keyword in node.keywords]
    elif isinstance(node, ast.Dict):
        items = [
            (ast.unparse(key).strip('\'"'), value) for key, value in zip(node.keys, node.values) if key is not None
        ]
    elif isinstance(node, (ast.List, ast.Tuple)) and any(isinstance(item, (ast.Call, ast.Dict)) for item in node.elts):
        items = [(str(number), item) for number, item in enumerate(node.elts)]
    else:
        items = []
    if not items:
        yield path, ast.unparse(node)
    for key, value in items:
        yield from _leaves(f'{path}.{key}', value)


def _is_valid(path: AnyPath) -> bool:
    try:
        verify(path)
    except CheckpointError:
        return False
    return True
