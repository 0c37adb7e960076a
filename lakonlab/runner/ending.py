"""How a run ends before its last iteration: saved, so that the same command goes on with it."""

from __future__ import annotations

import logging
import signal
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from lakonlab.runner.runner import Runner
    from lakonlab.runner.signals import StopRequest

logger = logging.getLogger('lakonlab.runner')

TERMINATED = 128 + signal.SIGTERM
"""Exit status of a process that another one's signal has stopped."""


def save_and_exit(runner: Runner, stop: StopRequest) -> NoReturn:
    """End a run that a signal has stopped.

    Args:
        runner: The run, between two iterations.
        stop: What this process was asked.

    Raises:
        SystemExit: Always.
        CheckpointError: The run could not be saved.
    """
    name = 'a signal to another process' if stop.signal is None else stop.signal.name
    _save(runner, f'stopped by {name} after iteration {runner.iter}', 'run the same command to go on')
    raise SystemExit(stop.exit_code or TERMINATED)


def save_and_fail(runner: Runner, error: Exception) -> NoReturn:
    """End a run with an error that all of its processes have met at the same place, see :meth:`Runner.end_with`.

    Args:
        runner: The run, between two iterations.
        error: The error.

    Raises:
        Exception: The error.
        CheckpointError: The run could not be saved; the error has been logged.
    """
    _save(runner, f'ended after iteration {runner.iter}', 'once the cause is mended, run the same command to go on')
    raise error


def _save(runner: Runner, what: str, how: str) -> None:
    hook = runner.checkpoint_hook
    if hook is None:
        logger.warning('%s; nothing saved', what)
    else:
        if hook.last_saved != runner.iter:
            hook.save(runner, runner.iter)
        hook.save_owed(runner)
        hook.finish()
        logger.info('%s, saved in %s; %s', what, runner.checkpoint_dir, how)
    runner.strategy.ranks.barrier()  # a process that ends before the others have saved would end them too
