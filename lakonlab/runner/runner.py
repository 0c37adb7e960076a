"""The training run: builds what a config describes, and the loop.

:meth:`Runner.train` is the whole of training. What surrounds an iteration (averages, timing, logs, evaluation,
checkpoints) are hooks, mmengine's own among them, in the order that the table at the start of the log shows.

Everything random is a function of (seed, iteration, row of the batch), and so is the data order, so a resumed run needs
only the weights, the optimisers' state and a few counters to be the same run.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from mmengine.config import Config
from torch import nn
from torch.optim import Optimizer

from lakonlab.config.load import dump_config, resolved_text
from lakonlab.datasets.order import data_order
from lakonlab.mmengine_parts import (
    Hook,
    IterTimerHook,
    LoggerHook,
    MessageHub,
    RuntimeInfoHook,
    Visualizer,
    get_priority,
)
from lakonlab.ops.random_source import SeededSource
from lakonlab.phases import PhaseClock, in_phase, phase
from lakonlab.ranks import ALONE, Ranks
from lakonlab.registry import DATASETS, MODELS
from lakonlab.runner.agreement import require_agreement, require_same_config
from lakonlab.runner.description import describe
from lakonlab.runner.ending import save_and_exit, save_and_fail
from lakonlab.runner.guard import SkipGuard
from lakonlab.runner.hooks.checkpoint import CheckpointHook
from lakonlab.runner.hooks.mirror import MirrorHook
from lakonlab.runner.log import (
    LineProcessor,
    LogSettings,
    ThroughputHook,
    attach_log_handlers,
    detach_log_handlers,
    log_settings,
    log_window,
)
from lakonlab.runner.lr_schedule import LearningRateSchedule
from lakonlab.runner.optimizer import build_optimizers
from lakonlab.runner.paths import run_directory
from lakonlab.runner.restore import restore, restore_replaced
from lakonlab.runner.resume import StartingPoint, find_starting_point
from lakonlab.runner.sections import build_hooks, training_loader_options
from lakonlab.runner.seeding import make_deterministic, seed_globals
from lakonlab.runner.signals import StopRequest
from lakonlab.runner.strategy import build_strategy
from lakonlab.runner.views import LearningRates, TrainingStream
from lakonlab.runner.watchdog import Watchdog, open_store
from lakonlab.storage.mirror import Mirror
from lakonlab.storage.publisher import publisher_of
from lakonlab.storage.writable import require_writable

logger = logging.getLogger('lakonlab.runner')

DEFAULT_GC_INTERVAL = 20
DEFAULT_WATCHDOG_SECONDS = 1800


class Runner:
    """One training run.

    Args:
        model: Has ``train_step(data, optimizer, running_status, source, exchange)``; wrapped by the strategy already.
        optimizers: By key.
        schedule: Learning rate as a function of (base, iteration).
        dataset: Training data of known length.
        loader: Called with the first iteration; returns the batches from there on.
        batch_size: Global batch.
        max_iters: Iterations of the whole run.
        work_dir: Directory of the logs.
        hooks: Hooks beyond those that every run has; one of them may be a :class:`CheckpointHook`.
        strategy: Processes and devices.
        seed: Seed of the run.
        cfg: The resolved config.
        settings: Logging.
        guard: Limit of skipped iterations.
        gc_interval: Collect garbage by hand every so many iterations; 0 or less leaves it to Python.
        watchdog_seconds: Longest time without a sign of progress; 0 for any.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: dict[str, Optimizer],
        schedule: LearningRateSchedule,
        dataset: Any,
        loader: Callable[[int], Iterable],
        *,
        batch_size: int,
        max_iters: int,
        work_dir: str | Path,
        strategy: Any,
        hooks: Sequence[Hook] = (),
        seed: int = 0,
        cfg: Config | None = None,
        settings: LogSettings | None = None,
        guard: SkipGuard | None = None,
        gc_interval: int = DEFAULT_GC_INTERVAL,
        watchdog_seconds: float = 0,
    ):
        self.model, self.optimizers, self.schedule = model, optimizers, schedule
        self.dataset, self._loader, self.batch_size = dataset, loader, batch_size
        self.order = data_order(dataset, batch_size, seed=seed)
        self.iter, self.first_iter, self.max_iters = 0, 0, max_iters
        self.work_dir = self.log_dir = self._log_dir = str(work_dir)
        self.strategy, self.rank, self.world_size = strategy, strategy.rank, strategy.world_size
        self.seed = seed
        self.cfg = Config() if cfg is None else cfg
        self.config_text = resolved_text(self.cfg)
        self.guard = guard or SkipGuard()
        self.gc_interval = max(0, gc_interval)
        self.watchdog_seconds = watchdog_seconds
        self.clock = PhaseClock(strategy.device)
        self.settings = settings or log_settings(None, work_dir)
        self.logger = logger
        self.timestamp = strategy.ranks.broadcast(time.strftime('%Y%m%d_%H%M%S'))
        self.experiment_name = f'{Path(work_dir).absolute().name}_{self.timestamp}'
        self.message_hub = MessageHub(self.experiment_name)
        backends = self.settings.backends if strategy.ranks.is_main else ()
        self.visualizer = Visualizer(vis_backends=[dict(backend) for backend in backends])
        self.log_processor = LineProcessor(window_size=self.settings.interval, by_epoch=False)
        self.optim_wrapper = LearningRates(optimizers)
        self.train_dataloader = TrainingStream((), dataset, max_iters)
        self.train_loop = self._train_loop = SimpleNamespace(dataloader=self.train_dataloader)
        every_run = [
            RuntimeInfoHook(),
            IterTimerHook(),
            ThroughputHook(self.settings.interval),
            LoggerHook(self.settings.interval, ignore_last=False, interval_exp_name=max_iters + 1),
        ]
        mirror = self.cfg.get('work_dir_mirror')
        self.mirror_hook = None
        if mirror is not None and strategy.ranks.is_main:
            self.mirror_hook = MirrorHook(Mirror(Path(work_dir), mirror), self.settings.interval)
            every_run.append(self.mirror_hook)
        self.hooks = sorted([*every_run, *hooks], key=lambda hook: get_priority(hook.priority))
        self.starting_point = StartingPoint(None, 'fresh', 'none was looked for')
        self.started_from: list[dict[str, str]] = []
        self.checkpoint_hook = next((hook for hook in self.hooks if isinstance(hook, CheckpointHook)), None)
        self._stop: StopRequest | None = None
        self.failure: Exception | None = None
        self.checkpoint_dir = run_directory(
            self.checkpoint_hook and self.checkpoint_hook.out_dir, self.work_dir, mirror
        )
        self.holder: str | None = None

    @classmethod
    def from_cfg(
        cls,
        cfg: Config,
        *,
        work_dir: str | Path | None = None,
        seed: int | None = None,
        resume_from: str | None = None,
        validate: bool = True,
        deterministic: bool = False,
        ranks: Ranks = ALONE,
        device: str | torch.device | None = None,
    ) -> Runner:
        """Build a run from a checked config and put it at its starting point.

        Args:
            cfg: The config.
            work_dir: Directory of the logs; None for ``cfg.work_dir``.
            seed: Seed of the run; None for ``cfg.seed``, or 2021 if there is none.
            resume_from: Checkpoint to resume from, named by the user; it must exist.
            validate: Whether to evaluate while training.
            deterministic: Whether to allow deterministic algorithms only.
            ranks: The processes that train together.
            device: Device of this process; None for the first accelerator, or the CPU if there is none.

        Returns:
            A run, ready for :meth:`train`.
        """
        work_dir = str(work_dir or cfg.get('work_dir') or f'work_dirs/{cfg.get("name", "run")}')
        seed = cfg.get('seed') if seed is None else seed
        seed = 2021 if seed is None else int(seed)
        options = dict(cfg.get('runner') or {})
        require_same_config(ranks, cfg, seed)
        if deterministic:
            make_deterministic()
        elif torch.cuda.is_available():
            torch.backends.cudnn.benchmark = bool(cfg.get('cudnn_benchmark', False))
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        if not cfg.get('cudnn_attention', True):
            torch.backends.cuda.enable_cudnn_sdp(False)
        strategy = build_strategy(cfg, ranks, device)
        if strategy.is_sharded:
            require_agreement(ranks, {'number of processes that share a copy': strategy.parts}, 'at launch')
        max_iters = cfg.total_iters
        settings = log_settings(cfg.get('log_config'), work_dir)
        schedule = LearningRateSchedule(max_iters, **(cfg.get('lr_config') or {}))
        hooks = build_hooks(cfg, validate)
        checkpoint_hook = next((hook for hook in hooks if isinstance(hook, CheckpointHook)), None)
        checkpoint_dir = run_directory(
            checkpoint_hook and checkpoint_hook.out_dir, work_dir, cfg.get('work_dir_mirror')
        )
        if checkpoint_hook is not None:
            ranks.on_main(partial(restore_replaced, checkpoint_dir))
        start = ranks.on_main(
            partial(
                find_starting_point,
                checkpoint_dir,
                resume_from=resume_from,
                configured_resume_from=cfg.get('resume_from'),
                load_from=cfg.get('load_from'),
                auto_resume=options.get('auto_resume', True) and checkpoint_hook is not None,
            )
        )

        dataset = DATASETS.build(cfg.data.train)
        loader_options = training_loader_options(cfg.data)
        for key, entry in cfg.optimizer.items():
            strategy.check_optimizer(key, entry)
        seed_globals(seed)
        model = MODELS.build(
            {**cfg.model, 'train_cfg': cfg.get('train_cfg') or {}, 'test_cfg': cfg.get('test_cfg') or {}}
        )
        model = strategy.wrap(model)

        def loader(start_iter: int) -> Iterable:
            from lakonlab.datasets.loader import build_dataloader

            return build_dataloader(
                dataset,
                shuffle=True,
                seed=seed,
                start_iter=start_iter,
                rank=strategy.rank,
                world_size=strategy.world_size,
                **loader_options,
            )

        runner = cls(
            model,
            build_optimizers(model, cfg.optimizer, strategy.optimizer_class),
            schedule,
            dataset,
            loader,
            batch_size=loader_options['samples_per_gpu'] * strategy.world_size,
            max_iters=max_iters,
            work_dir=work_dir,
            strategy=strategy,
            hooks=hooks,
            seed=seed,
            cfg=cfg,
            settings=settings,
            guard=SkipGuard(options.get('max_skipped_iters', 20)),
            gc_interval=options.get('gc_interval', DEFAULT_GC_INTERVAL),
            watchdog_seconds=options.get('watchdog_seconds', DEFAULT_WATCHDOG_SECONDS),
        )
        runner.starting_point = start
        return runner

    @property
    def epoch(self) -> int:
        """The epoch of the data to which this iteration's batch belongs."""
        return self.order.epoch(self.iter)

    @property
    def max_epochs(self) -> int:
        """Epochs that the run begins."""
        return -(-self.max_iters * self.batch_size // len(self.dataset))

    @property
    def is_asked_to_stop(self) -> bool:
        """Whether a signal has asked this process, or any in the step before, to stop."""
        return self.strategy.stop_requested or (self._stop is not None and self._stop.signal is not None)

    def train(self) -> None:
        """Train from the starting point to the last iteration.

        Ctrl-C and SIGTERM end the run after the iteration in progress, saved. An evaluation is given up, and made when
        the run goes on. One that fails ends the run in the same way, with its error.

        Raises:
            SystemExit: The run was stopped by a signal; the code is 130 or 143.
            TrainingDivergedError: Too many steps in a row were skipped.
            CheckpointError: The starting point does not fit, or a checkpoint could not be written.
            Exception: What failed in an evaluation.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.clock.active())
            self._enter(stack)
            logger.info('%s', describe(self))
            restore(self)
            require_agreement(self.strategy.ranks, self.facts(self.iter), 'at the start')
            is_done = self.iter >= self.max_iters
            if is_done and not self._owes_evaluation():
                logger.info('all %d iterations are done: nothing to train', self.max_iters)
                return
            if self.watchdog_seconds:
                stack.enter_context(self._watchdog())
            stop = self._stop = stack.enter_context(StopRequest())
            self.train_dataloader.batches = self._loader(self.iter)
            self.model.train()
            self.call_hook('before_run')
            self.call_hook('before_train')
            self.call_hook('before_train_epoch')
            if self.failure is not None:
                save_and_fail(self, self.failure)
            if self._owes_evaluation():  # stopped again while it was made up for
                save_and_exit(self, stop)
            self.clock.restart()
            for batch in in_phase('data', () if is_done else self.train_dataloader):
                # processes notice a signal at different moments, and learn of it with the sums of the same step
                self.strategy.stop_requested = stop.signal is not None
                self.train_iter(batch)
                is_stopped = self.strategy.stop_requested if self.world_size > 1 else stop.signal is not None
                if self.failure is not None:
                    save_and_fail(self, self.failure)
                if self.iter == self.max_iters or is_stopped:
                    break
            if self.iter < self.max_iters or self._owes_evaluation():
                save_and_exit(self, stop)
            if is_done and self.checkpoint_hook is not None:
                self.checkpoint_hook.save(self, self.iter)  # one that owes no evaluation
            self.call_hook('after_train_epoch')
            self.call_hook('after_train')
            self.call_hook('after_run')
            logger.info('finished %d iterations', self.max_iters)

    def train_iter(self, batch: dict[str, Any]) -> None:
        """One iteration.

        Args:
            batch: This rank's part of the global batch.
        """
        if not self.model.training:
            self.model.train()
        seed_globals(self.seed, self.iter, self.rank)
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group['lr'] = self.schedule(group['initial_lr'], self.iter)
        self.call_hook('before_train_iter', batch_idx=self.iter, data_batch=batch)
        with phase('data'):
            batch_on_device = self.strategy.to_device(batch)
        outputs = self.model.train_step(
            batch_on_device,
            self.optimizers,
            running_status={'iteration': self.iter, 'epoch': self.epoch},
            source=SeededSource(self.seed, self.iter, first_row=self.rank * self.batch_size // self.world_size),
            exchange=self.strategy,
        )
        lr = {key: optimizer.param_groups[0]['lr'] for key, optimizer in self.optimizers.items()}
        self.guard.update(self.iter, outputs['skipped'], outputs['log_vars'], lr)
        self.call_hook('after_train_iter', batch_idx=self.iter, data_batch=batch, outputs=outputs['log_vars'])
        self.iter += 1
        if self.gc_interval and self.iter % self.gc_interval == 0:
            gc.collect()

    def call_hook(self, event: str, **kwargs) -> None:
        """Call one method of all hooks, in their order.

        Args:
            event: Name of the method.
            **kwargs: Its arguments beside the runner.
        """
        for hook in self.hooks:
            getattr(hook, event)(self, **kwargs)

    def end_with(self, error: Exception, what: str) -> None:
        """End the run with an error that does no harm to its state, after the iteration in progress, saved.

        Args:
            error: What every process has met at the same place; only the first one ends the run.
            what: What has failed.
        """
        if self.strategy.ranks.is_main:
            name = type(error).__name__
            logger.error('%s has failed: %s: %s; the run is saved, if it can be, and ends', what, name, error)
        self.failure = self.failure or error

    def state_dict(self, step: int) -> dict[str, Any]:
        """Everything but tensors that a resumed run needs, as plain data.

        Args:
            step: Completed iterations.
        """
        return {
            'iteration': step,
            'guard': self.guard.state_dict(),
            'hooks': {name: hook.state_dict() for name, hook in self.hooks_with_state()},
            'log_window': log_window(self.message_hub),
            'data': self.data_identity(),
            'optimizer_types': self.optimizer_types(),
            'started_from': self.started_from,
        }

    def facts(self, step: int) -> dict[str, Any]:
        """What all processes of the run have to agree on after ``step`` completed iterations."""
        groups = [group for optimizer in self.optimizers.values() for group in optimizer.param_groups]
        return {
            'config': hashlib.sha256(self.config_text.encode()).hexdigest()[:12],
            'iteration': step,
            'learning rates': [group['lr'] for group in groups],
            'data': {**self.data_identity(), 'position': step * self.batch_size, 'epoch': self.order.epoch(step)},
            'strategy': self.strategy.name,
            'torch': torch.__version__,
        }

    def _owes_evaluation(self) -> bool:
        """Whether an evaluation of the weights as they are was given up."""
        return any(getattr(hook, 'owed', None) == self.iter for hook in self.hooks)

    def hooks_with_state(self) -> list[tuple[str, Hook]]:
        """Hooks that checkpoints hold something of, by a name that is theirs alone."""
        counts: dict[str, int] = {}
        named = []
        for hook in self.hooks:
            if hasattr(hook, 'state_dict') and hasattr(hook, 'load_state_dict'):
                kind = type(hook).__name__
                named.append((f'{kind}.{counts.get(kind, 0)}', hook))
                counts[kind] = counts.get(kind, 0) + 1
        return named

    def data_identity(self) -> dict[str, Any]:
        """What decides which samples an iteration reads and what it draws."""
        return {
            'seed': self.seed,
            'batch_size': self.batch_size,
            'dataset_size': len(self.dataset),
            'buckets': self.order.buckets,
        }

    def optimizer_types(self) -> dict[str, str]:
        """Optimiser key -> class name."""
        return {key: type(optimizer).__name__ for key, optimizer in self.optimizers.items()}

    def _enter(self, stack: contextlib.ExitStack) -> None:
        """Open what the run holds while it trains."""
        ranks = self.strategy.ranks
        ranks.together(lambda: require_writable(self.work_dir, 'work_dir'))
        level = self.cfg.get('log_level') or 'INFO'
        log_file = Path(self.work_dir) / f'{self.timestamp}.log'
        handlers = attach_log_handlers(log_file, level, rank=self.rank, all_ranks=self.settings.all_ranks)
        stack.callback(detach_log_handlers, handlers)
        if self.checkpoint_hook is not None:  # first: a run that is refused changes nothing of the one that goes on
            ranks.on_main(lambda: self._hold_checkpoint_dir(stack))
            ranks.together(lambda: publisher_of(self.checkpoint_dir).require_shared(self.checkpoint_dir))
        if self.cfg.get('work_dir_mirror') is not None:
            ranks.on_main(lambda: self._enter_mirror(stack))
        if self.cfg.filename is not None:
            ranks.on_main(lambda: dump_config(self.cfg, Path(self.work_dir) / Path(self.cfg.filename).name))
        if self.checkpoint_hook is not None:
            stack.callback(self.checkpoint_hook.close)
        stack.callback(self.visualizer.close)
        if self.gc_interval:
            gc.collect()
            gc.freeze()  # what lives as long as the run need not be visited at every collection
            gc.disable()
            stack.callback(gc.unfreeze)
            stack.callback(gc.enable)

    def _watchdog(self) -> Watchdog:
        ranks = self.strategy.ranks
        return Watchdog(
            ranks,
            self.clock,
            self.watchdog_seconds,
            Path(self.work_dir),
            iteration=lambda: self.iter + 1,
            store=open_store(ranks),
        )

    def _hold_checkpoint_dir(self, stack: contextlib.ExitStack) -> None:
        require_writable(self.checkpoint_dir, 'checkpoint_config.out_dir')
        self.holder = stack.enter_context(publisher_of(self.checkpoint_dir).hold(self.checkpoint_dir))

    def _enter_mirror(self, stack: contextlib.ExitStack) -> None:
        stack.enter_context(self.mirror_hook.active())
