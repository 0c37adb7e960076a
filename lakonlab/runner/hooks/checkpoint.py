"""When a run saves, and what of it stays."""

from __future__ import annotations

import copy
import logging
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from lakonlab.mmengine_parts import Hook
from lakonlab.registry import HOOKS
from lakonlab.runner.paths import require_local
from lakonlab.storage.background import BackgroundWriter
from lakonlab.storage.checkpoint import write_checkpoint
from lakonlab.storage.local import remove_stale_temporaries
from lakonlab.storage.retention import prune

logger = logging.getLogger(__name__)


def run_directory(out_dir: str | None, work_dir: str) -> Path:
    """Where a run's checkpoints go: ``<out_dir>/<name of work_dir>``, or ``work_dir`` itself if that is ``out_dir``.

    Args:
        out_dir: ``checkpoint_config.out_dir``; None for ``checkpoints``.
        work_dir: Directory of the logs.

    Raises:
        ConfigError: One of them is no local directory.
    """
    require_local(out_dir, 'checkpoint_config.out_dir')
    require_local(work_dir, 'work_dir')
    out = Path('checkpoints' if out_dir is None else out_dir).expanduser()
    work = Path(work_dir).expanduser()
    return out if out.absolute() == work.absolute() else out / work.absolute().name


@HOOKS.register_module()
class CheckpointHook(Hook):
    """The section ``checkpoint_config`` of a config.

    Saves after iterations divisible by ``interval`` or ``must_save_interval``, and at the end. The training thread only
    copies the state; one background thread writes it. A failed write ends the run at its next iteration; what was saved
    before stays.

    Args:
        interval: Iterations between saves, at least 1.
        out_dir: Parent of the run's checkpoint directory; None for ``checkpoints``.
        max_keep_ckpts: How many of the newest checkpoints are kept; -1 for all.
        must_save_interval: Iterations divisible by it are saved too, and kept for ever.
        save_last: Whether the last iteration is saved whatever the interval.
        save_optimizer: Whether the optimiser's state is saved; without it a run cannot be resumed exactly.
        asynchronous: Whether to write in the background.
        by_epoch: Only False: intervals count iterations.

    Raises:
        ValueError: A value out of range.
    """

    priority = 'VERY_LOW'

    def __init__(
        self,
        interval: int,
        out_dir: str | None = None,
        max_keep_ckpts: int = -1,
        must_save_interval: int | None = None,
        save_last: bool = True,
        save_optimizer: bool = True,
        asynchronous: bool = True,
        by_epoch: bool = False,
    ):
        if interval < 1:
            raise ValueError(f'checkpoint_config.interval={interval}: expected at least 1')
        if max_keep_ckpts < 1 and max_keep_ckpts != -1:
            raise ValueError(f'checkpoint_config.max_keep_ckpts={max_keep_ckpts}: expected at least 1, or -1 for all')
        if must_save_interval is not None and must_save_interval < 1:
            raise ValueError(f'checkpoint_config.must_save_interval={must_save_interval}: expected at least 1 or None')
        if by_epoch:
            raise ValueError('checkpoint_config.by_epoch=True: intervals count iterations here; set it to False')
        self.interval = interval
        self.out_dir = out_dir
        self.max_keep_ckpts = max_keep_ckpts
        self.must_save_interval = must_save_interval
        self.save_last = save_last
        self.save_optimizer = save_optimizer
        self.asynchronous = asynchronous
        self.last_saved: int | None = None
        self._writer = BackgroundWriter()

    def before_train(self, runner) -> None:
        """Remove what an interrupted save left behind."""
        if runner.rank != 0:
            return
        removed = remove_stale_temporaries(runner.checkpoint_dir)
        if removed:
            logger.info('removed from an interrupted save: %s', ', '.join(removed))

    def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        """Report a failed background write."""
        self._writer.check()

    def is_due(self, step: int, max_iters: int) -> bool:
        """Whether to save after ``step`` completed iterations of ``max_iters``."""
        if step == max_iters and self.save_last:
            return True
        return step % self.interval == 0 or bool(self.must_save_interval and step % self.must_save_interval == 0)

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Save if it is time to."""
        step = runner.iter + 1
        if self.is_due(step, runner.max_iters):
            self.save(runner, step, wait=step == runner.max_iters)

    def save(self, runner, step: int, wait: bool = False) -> None:
        """Save the run as it is after ``step`` completed iterations.

        Args:
            runner: The run.
            step: Completed iterations.
            wait: Whether to return only when the checkpoint is published.

        Raises:
            CheckpointError: This write failed (when waiting), or the one before did.
        """
        self._writer.wait()
        strategy = runner.strategy
        tensors = {'model': strategy.snapshot(strategy.model_state(runner.model))}
        state = runner.state_dict(step)
        if self.save_optimizer:
            optimizer_tensors, state['optimizers'] = strategy.optimizer_state(runner.model, runner.optimizers)
            tensors['optimizer'] = strategy.snapshot(optimizer_tensors)
        job = partial(self._write, runner.checkpoint_dir, step, tensors, copy.deepcopy(state), runner.config_text)
        self.last_saved = step
        self._writer.submit(job)
        if wait or not self.asynchronous:
            self._writer.wait()

    def _write(
        self, run_dir: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any], config: str
    ) -> None:
        path = write_checkpoint(run_dir, step, tensors, state, config)
        logger.info('saved %s', path)
        prune(run_dir, step, self.max_keep_ckpts, self.must_save_interval)

    def close(self) -> None:
        """Wait for a running write; reports its failure."""
        self._writer.close()
