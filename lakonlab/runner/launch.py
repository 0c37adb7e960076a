"""From the command line to a run: what ``tools/train.py`` and ``tools/test.py`` do after reading their arguments."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config

from lakonlab.config.check import check_config
from lakonlab.config.errors import ConfigError, describe_unknown
from lakonlab.config.load import load_config
from lakonlab.config.options import parse_options
from lakonlab.runner.paths import check_places, require_writable_places, settle_work_dir

logger = logging.getLogger('lakonlab.runner')

DEFAULT_SEED = 2021


def run_command(command: Callable[[Namespace], int], args: Namespace) -> int:
    """Run a command; errors that a user can mend are printed without a traceback.

    Args:
        command: :func:`train` or :func:`test`.
        args: Its arguments.

    Returns:
        The exit status.
    """
    # read by MKL at its first product: with several threads the bits of a product otherwise differ from call to call,
    # and a resumed run on CPUs would not end with the same weights
    os.environ.setdefault('MKL_CBWR', 'AUTO')
    from lakonlab.models.architecture.loading import PretrainedError
    from lakonlab.ranks import is_reported_by_main
    from lakonlab.runner.agreement import DisagreementError
    from lakonlab.runner.guard import TrainingDivergedError
    from lakonlab.storage.checkpoint import CheckpointError

    try:
        return command(args)
    except (ConfigError, CheckpointError, DisagreementError, PretrainedError, TrainingDivergedError, OSError) as error:
        if not is_reported_by_main(error):
            print(f'error: {error}', file=sys.stderr)  # noqa: T201
        return 1


def train(args: Namespace) -> int:
    """Train what a config describes.

    Args:
        args: ``config``, ``work_dir``, ``resume_from``, ``no_validate``, ``seed``, ``diff_seed``, ``deterministic``,
            ``cfg_options``, ``launcher``, ``dry_run``, ``plan_world_size`` and the deprecated ``gpus``, ``gpu_ids``,
            ``gpu_id``.

    Returns:
        The exit status.
    """
    with logged_to_console() as console:
        note_deprecated(args)
        cfg = _prepare(args, training=True)
        if args.dry_run:
            from lakonlab.runner.dry_run import dry_run
            from lakonlab.runner.memory_plan import parse_world_sizes

            with impossible_values():
                world_sizes = parse_world_sizes(getattr(args, 'plan_world_size', None) or '1,8')
                print(dry_run(cfg, cfg.work_dir, cfg.seed, args.resume_from, world_sizes))  # noqa: T201
            return 0

        from lakonlab.parallel.launch import start_processes, stop_processes
        from lakonlab.runner.data_plan import check_data, used_splits
        from lakonlab.runner.dry_run import build_on_meta
        from lakonlab.runner.runner import Runner
        from lakonlab.runner.signals import ignore_termination

        with impossible_values():
            # a process that fails ends without waiting for the others, which its launcher then ends
            ranks, device = start_processes(args.launcher, cfg.get('dist_params'))
            if not ranks.is_main:
                console.setLevel('WARNING')
            ranks.on_main(lambda: require_writable_places(cfg))
            ranks.together(lambda: build_on_meta(cfg))
            ranks.on_main(lambda: check_data(cfg, used_splits(cfg, training=True, evaluating=not args.no_validate)))
            runner = Runner.from_cfg(
                cfg,
                work_dir=cfg.work_dir,
                seed=cfg.seed,
                resume_from=args.resume_from,
                validate=not args.no_validate,
                deterministic=args.deterministic,
                ranks=ranks,
                device=device,
            )
    # later errors are not about values of the config: these were all in use for an iteration
    with impossible_values(lambda: runner.iter == runner.first_iter):
        try:
            runner.train()
        except SystemExit:  # stopped by a signal, and saved; the launcher ends the others when the first one leaves
            if ranks.world_size > 1:
                ignore_termination()
            stop_processes(ranks)
            raise
    stop_processes(ranks)
    return 0


def test(args: Namespace) -> int:
    """Run the evaluations of a config and write ``results.json`` into its ``work_dir``.

    Args:
        args: ``config``, ``ckpt``, ``data``, ``work_dir``, ``seed``, ``diff_seed``, ``deterministic``, ``cfg_options``,
            ``launcher``, ``skip_existing``, ``reuse_viz``, ``timer``, ``dry_run`` and the deprecated ``gpus``,
            ``gpu_ids``, ``gpu_id``.

    Returns:
        The exit status.
    """
    with logged_to_console():
        note_deprecated(args)
        if args.reuse_viz and args.timer:
            raise ConfigError(
                '--reuse-viz with --timer: what is read from files takes no time to sample; leave one out'
            )
        cfg = _prepare(args, training=False)
        _check_splits(cfg, args.data)
        if args.dry_run:
            from lakonlab.runner.evaluation_plan import evaluation_plan

            with impossible_values():
                print(evaluation_plan(cfg, args.ckpt, args.data))  # noqa: T201
            return 0

    from lakonlab.parallel.launch import start_processes, stop_processes
    from lakonlab.runner.data_plan import check_data, used_splits
    from lakonlab.runner.hooks.mirror import mirroring
    from lakonlab.runner.log import attach_log_handlers, detach_log_handlers
    from lakonlab.runner.strategy import build_strategy
    from lakonlab.runner.testing import evaluate_checkpoint
    from lakonlab.storage.mirror import Mirror

    with logged_to_console(), impossible_values():
        ranks, device = start_processes(args.launcher, cfg.get('dist_params'))
        strategy = build_strategy(cfg, ranks, device)
        ranks.on_main(lambda: require_writable_places(cfg, 'work_dir_mirror', *_viz_settings(cfg, args.data)))
        ranks.on_main(lambda: check_data(cfg, args.data or used_splits(cfg, training=False)))
    Path(cfg.work_dir).mkdir(parents=True, exist_ok=True)
    mirror = cfg.get('work_dir_mirror')
    mirror = Mirror(Path(cfg.work_dir), mirror) if mirror is not None and ranks.is_main else None
    log_file = Path(cfg.work_dir) / f'{time.strftime("%Y%m%d_%H%M%S")}_test.log'
    handlers = attach_log_handlers(log_file, cfg.get('log_level') or 'INFO', rank=ranks.rank)
    try:
        with impossible_values(), mirroring(mirror, ranks):
            evaluate_checkpoint(
                cfg,
                checkpoint=args.ckpt,
                splits=args.data,
                seed=cfg.seed,
                deterministic=args.deterministic,
                skip_existing=args.skip_existing,
                timer=args.timer,
                reuse_viz=args.reuse_viz,
                command=shlex.join([Path(sys.executable).name, *sys.argv]),
                strategy=strategy,
            )
    finally:
        detach_log_handlers(handlers)
    stop_processes(ranks)
    return 0


def _prepare(args: Namespace, training: bool) -> Config:
    """The checked config, with the directory and seed of this run filled in."""
    cfg = load_config(args.config, parse_options(args.cfg_options or ()))
    planning = getattr(args, 'dry_run', False)
    check_config(
        cfg,
        training=training,
        planning=planning,
        single_process=args.launcher == 'none',
    )
    cfg.work_dir = str(args.work_dir or cfg.get('work_dir') or Path('work_dirs') / cfg.name)
    settle_work_dir(cfg)
    options = {'--resume-from': getattr(args, 'resume_from', None), '--ckpt': getattr(args, 'ckpt', None)}
    check_places(cfg, options, planning)
    configured = cfg.get('seed')
    cfg.seed = args.seed if args.seed is not None else DEFAULT_SEED if configured is None else configured
    return cfg


def _viz_settings(cfg: Config, splits: Sequence[str] | None) -> list[str]:
    """Names of ``viz_dir`` of the entries that are evaluated."""
    entries = enumerate(cfg.get('evaluation') or ())
    return [f'evaluation[{i}].viz_dir' for i, entry in entries if splits is None or entry.get('data', 'val') in splits]


def _check_splits(cfg: Config, splits: Sequence[str] | None) -> None:
    known = [entry.get('data', 'val') for entry in cfg.get('evaluation') or ()]
    if not known:
        raise ConfigError(
            f'evaluation={cfg.get("evaluation")!r}: nothing to evaluate; expected a list of '
            "dict(type='GenerativeEvalHook', data=..., metrics=[...])"
        )
    for split in splits or ():
        if split not in known:
            raise ConfigError(
                describe_unknown('--data', 'data split that an evaluation of this config uses', split, known)
            )


def note_deprecated(args: Namespace) -> None:
    """Say in the log which options of the command line have no effect."""
    given = [name for name in ('gpus', 'gpu_ids', 'gpu_id') if getattr(args, name, None) is not None]
    if given:
        options = ', '.join('--' + name.replace('_', '-') for name in given)
        logger.warning('%s: deprecated and without effect; choose devices with CUDA_VISIBLE_DEVICES', options)
    if args.diff_seed:
        logger.info('--diff_seed: every sample of a batch has its own random numbers anyway, on whichever process')


@contextlib.contextmanager
def impossible_values(applies: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Report a value that is refused as what it is, an error in the config; ``log_level='DEBUG'`` shows where."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        if not applies():
            raise
        logger.debug('refused here:', exc_info=True)
        raise ConfigError(str(error)) from error


@contextlib.contextmanager
def logged_to_console() -> Iterator[logging.Handler]:
    """Send log messages to the console until the run has its own log."""
    package: Any = logging.getLogger('lakonlab')
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter('%(levelname)s - %(message)s'))
    package.addHandler(handler)
    package.setLevel('INFO')
    try:
        yield handler
    finally:
        package.removeHandler(handler)
