"""Puts a run where it starts: the weights, the optimisers and the counters of a checkpoint."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from lakonlab.runner.log import load_log_window
from lakonlab.runner.resume import (
    config_differences,
    require_same_run,
    require_seen,
    require_untouched,
    set_aside_later,
)
from lakonlab.storage.checkpoint import content_digest, read_manifest, read_state
from lakonlab.storage.publisher import publisher_of
from lakonlab.storage.remote_path import AnyPath

if TYPE_CHECKING:
    from lakonlab.runner.runner import Runner

logger = logging.getLogger('lakonlab.runner')


def restore(runner: Runner) -> None:
    """Load what the starting point of a run says, and compare the run with it. Every process of the run calls this.

    Args:
        runner: The run, which holds its checkpoint directory.

    Raises:
        CheckpointError: The checkpoint is of another run or model, another process has saved meanwhile, or a process
            does not see what the main one sees.
    """
    start = runner.starting_point
    if runner.checkpoint_hook is not None:
        runner.strategy.ranks.on_main(lambda: require_untouched(runner.checkpoint_dir, start))
    if start.mode == 'fresh':
        logger.info('starting from the beginning (%s)', start.reason)
        return
    ranks = runner.strategy.ranks
    digest = ranks.on_main(lambda: content_digest(start.checkpoint))
    ranks.together(lambda: require_seen(start.checkpoint, digest))
    ranks.together(lambda: runner.strategy.load_model_state(runner.model, start.checkpoint))
    if start.mode == 'weights':
        logger.info('starting with the weights of %s (%s)', start.checkpoint, start.reason)
        return
    state = ranks.together(lambda: read_state(start.checkpoint))
    ranks.together(lambda: require_same_run(start, state, runner.data_identity(), runner.optimizer_types()))
    runner.started_from = [*(state.get('started_from') or ()), *([start.origin()] if start.named else ())]
    for line in config_differences(read_manifest(start.checkpoint).get('config', ''), runner.config_text):
        logger.info('config changed since %s was saved: %s', start.checkpoint, line)
    if 'optimizers' in state:
        ranks.together(
            lambda: runner.strategy.load_optimizer_state(
                runner.model, runner.optimizers, start.checkpoint, state['optimizers']
            )
        )
        runner.strategy.report_restored(start.checkpoint)
    else:
        logger.warning('%s was saved without optimizer state: the optimizers start anew', start.checkpoint)
    runner.iter = runner.first_iter = state['iteration']
    runner.guard.load_state_dict(state['guard'])
    for name, hook in runner.hooks_with_state():
        if name in state['hooks']:
            hook.load_state_dict(state['hooks'][name])
    load_log_window(runner.message_hub, state['log_window'], runner.settings.interval)
    if start.checkpoint.parent.absolute() == runner.checkpoint_dir.absolute():
        ranks.on_main(lambda: set_aside_later(runner.checkpoint_dir, runner.iter))
    logger.info('resuming after iteration %d from %s (%s)', runner.iter, start.checkpoint, start.reason)


def restore_replaced(checkpoint_dir: AnyPath) -> None:
    """Bring back checkpoints that a killed process was about to replace.

    Args:
        checkpoint_dir: Directory of the run's checkpoints.
    """
    restored = publisher_of(checkpoint_dir).restore(checkpoint_dir)
    if restored:
        logger.info('restored, replacing it was interrupted: %s', ', '.join(restored))
