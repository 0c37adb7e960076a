"""When a run saves, and what of it stays."""

from __future__ import annotations

import logging
import re
from functools import partial

from lakonlab.mmengine_parts import Hook
from lakonlab.parallel.checkpoint_writer import CheckpointWriter, SaveJob
from lakonlab.phases import phase
from lakonlab.registry import HOOKS
from lakonlab.runner.agreement import require_agreement
from lakonlab.storage.checkpoint import CheckpointError, checkpoint_name
from lakonlab.storage.inference_weights import add_inference_weights
from lakonlab.storage.publisher import publisher_of
from lakonlab.storage.remote_path import AnyPath
from lakonlab.storage.retention import prune

logger = logging.getLogger(__name__)

EXPORTS = {'ema': 'diffusion_ema', 'student': 'diffusion'}


@HOOKS.register_module()
class CheckpointHook(Hook):
    """The section ``checkpoint_config`` of a config.

    Saves after iterations divisible by ``interval`` or ``must_save_interval``, and at the end. Training only copies the
    state; a process beside it writes. A failed write ends the run at its next iteration; what was saved before stays.

    Args:
        interval: Iterations between saves, at least 1.
        out_dir: Parent of the run's checkpoint directory, local or ``s3://``; None for ``checkpoints``.
        max_keep_ckpts: How many of the newest checkpoints are kept; -1 for all.
        must_save_interval: Iterations divisible by it are saved too, and kept for ever.
        save_last: Whether the last iteration is saved whatever the interval.
        save_optimizer: Whether the optimiser's state is saved; without it a run cannot be resumed exactly.
        asynchronous: Whether to write in a process beside each process of the run while training goes on.
        export: ``'ema'`` or ``'student'``: every checkpoint holds its weights for inference too, in the folder
            ``export``, those of a student as an adapter that the pipelines load; None for none.
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
        export: str | None = None,
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
        if export is not None and export not in EXPORTS:
            raise ValueError(f'checkpoint_config.export={export!r}: expected one of {", ".join(EXPORTS)}, or None')
        self.interval = interval
        self.out_dir = out_dir
        self.max_keep_ckpts = max_keep_ckpts
        self.must_save_interval = must_save_interval
        self.save_last = save_last
        self.save_optimizer = save_optimizer
        self.asynchronous = asynchronous
        self.export = export
        self.last_saved: int | None = None
        self._best: list[str] = []
        self._writer: CheckpointWriter | None = None

    def before_train(self, runner) -> None:
        """Remove what an interrupted save left behind, and get ready to write."""
        removed = runner.strategy.ranks.on_main(
            lambda: publisher_of(runner.checkpoint_dir).clean(runner.checkpoint_dir)
        )
        if removed:
            logger.info('removed from an interrupted save: %s', ', '.join(removed))
        self._require_exported(runner)
        self._writer_of(runner).start()

    def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        """Let every process know of a failed write; save what an evaluation asked for that came after this hook."""
        self.save_owed(runner)
        if self._writer is not None:
            self._report_finished()
            runner.strategy.failed = self._writer.has_failed()

    def is_due(self, step: int, max_iters: int) -> bool:
        """Whether to save after ``step`` completed iterations of ``max_iters``."""
        if step == max_iters and self.save_last:
            return True
        return step % self.interval == 0 or bool(self.must_save_interval and step % self.must_save_interval == 0)

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Report a failed write, in all processes at the same iteration; save if it is time to."""
        step = runner.iter + 1
        if runner.strategy.failed:
            self._writer.wait()
        if self.is_due(step, runner.max_iters):
            self.save(runner, step, wait=step == runner.max_iters)
        elif self._best:
            self.save(runner, step, for_itself=False)

    def after_train(self, runner) -> None:
        """See :meth:`save_owed`."""
        self.save_owed(runner)

    def save_owed(self, runner) -> None:
        """Save what :meth:`save_best` has asked for since the last save. Every process of the run calls this."""
        if self._best:
            self.save(runner, runner.iter, for_itself=False)

    def save(self, runner, step: int, wait: bool = False, for_itself: bool = True) -> None:
        """Save the run as it is after ``step`` completed iterations. Every process of the run calls this.

        Args:
            runner: The run.
            step: Completed iterations.
            wait: Whether to return only when the checkpoint is published.
            for_itself: Whether it is saved as the checkpoint of the step, beside what :meth:`save_best` has asked for,
                of which the same copy of the state is written.

        Raises:
            CheckpointError: This write failed (when waiting), or the one before did.
            RuntimeError: The processes do not agree on what they save.
        """
        with phase('checkpoint'):
            strategy = runner.strategy
            require_agreement(strategy.ranks, runner.facts(step), f'at the checkpoint of iteration {step}')
            writer = self._writer_of(runner)
            _report(writer.wait())
            parts = {'model': strategy.model_state(runner.model)}
            state = runner.state_dict(step)
            if self.save_optimizer:
                parts['optimizer'], state['optimizers'] = strategy.optimizer_state(runner.model, runner.optimizers)
            names: list[str | None] = [*self._best]  # first: what the run remembers as its best is there before it is
            self._best = []
            afterwards = []
            if for_itself:
                names.append(None)
                self.last_saved = step
                afterwards = [partial(prune, runner.checkpoint_dir, step, self.max_keep_ckpts, self.must_save_interval)]
            extra = None if self.export is None else self._exporter(runner, step)
            confirm = partial(publisher_of(runner.checkpoint_dir).confirm, runner.checkpoint_dir, runner.holder)
            job = SaveJob(
                runner.checkpoint_dir, step, state, runner.config_text, tuple(names), extra, confirm, tuple(afterwards)
            )
            writer.submit(job, parts)
            if wait or not self.asynchronous:
                _report(writer.wait())

    def save_best(self, step: int, name: str, value: float) -> None:
        """Save the run as the best so far, in the place of the best before, when this iteration ends.

        Args:
            step: Completed iterations.
            name: What it is the best by; its checkpoint is ``best_<name>``.
            value: The best value.
        """
        logger.info('%s = %.4f of iteration %d is the best so far', name, value, step)
        self._best.append(f'best_{re.sub("[^A-Za-z0-9_.-]+", "_", name)}')

    def _require_exported(self, runner) -> None:
        from lakonlab.runner.adapter_folder import describe_adapter, has_policy

        names = runner.strategy.model_state(runner.model)
        prefix = f'{EXPORTS.get(self.export)}.denoising.'
        if self.export is not None and not any(name.startswith(prefix) for name in names):
            raise CheckpointError(
                f'checkpoint_config.export={self.export!r}, but the run saves no {prefix.removesuffix(".")}: set '
                'model.diffusion_use_ema=True, or choose another one'
            )
        if self.export is not None and has_policy(runner.cfg):  # what cannot be described is found before training
            describe_adapter(runner.cfg, role=self.export, step=0, origin='').card[1]('')

    def _exporter(self, runner, step: int):
        """What adds the weights for inference to a checkpoint, see ``add_inference_weights``; it can be pickled."""
        from lakonlab.runner.adapter_folder import describe_adapter, has_policy

        folder = {}
        if has_policy(runner.cfg):
            folder = describe_adapter(runner.cfg, role=self.export, step=step, origin=checkpoint_name(step))._asdict()
        return partial(add_inference_weights, role=EXPORTS[self.export], **folder)

    def _writer_of(self, runner) -> CheckpointWriter:
        if self._writer is None:
            self._writer = CheckpointWriter(runner.strategy.ranks, self.asynchronous)
        return self._writer

    def _report_finished(self) -> None:
        path = self._writer.finished()
        if path is not None:
            _report(path)

    def after_run(self, runner) -> None:
        """Wait for a running write."""
        self.finish()

    def finish(self) -> None:
        """Wait for a running write. Every process of the run calls this.

        Raises:
            CheckpointError: It failed.
        """
        if self._writer is not None:
            _report(self._writer.wait())
            self.close()

    def close(self) -> None:
        """End the writer, after what it is writing; for the end of a run, good or bad, so failures are only logged."""
        if self._writer is not None:
            writer, self._writer = self._writer, None
            try:
                _report(writer.close())
            except CheckpointError as error:
                logger.error('%s', error)


def _report(path: AnyPath | None) -> None:
    if path is not None:
        logger.info('saved %s', path)
