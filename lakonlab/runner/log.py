"""Console, log file, JSON lines, TensorBoard and Weights & Biases, through mmengine's hooks and backends."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lakonlab.mmengine_parts import HistoryBuffer, Hook, MessageHub

LOG_FORMAT = '%(asctime)s - %(levelname)s - %(message)s'


def attach_log_handlers(log_file: Path, level: str = 'INFO', console: bool = True) -> list[logging.Handler]:
    """Send what the package logs to a file and to the console.

    Args:
        log_file: Appended to.
        level: Least level that is reported.
        console: Whether to write to standard output too.

    Returns:
        The handlers, for :func:`detach_log_handlers`.
    """
    handlers: list[logging.Handler] = [logging.FileHandler(log_file, encoding='utf-8')]
    if console:
        handlers.append(logging.StreamHandler(sys.stdout))
    package_logger = logging.getLogger('lakonlab')
    package_logger.setLevel(level)
    for handler in handlers:
        handler.setFormatter(logging.Formatter(LOG_FORMAT))
        package_logger.addHandler(handler)
    return handlers


def detach_log_handlers(handlers: list[logging.Handler]) -> None:
    """Undo :func:`attach_log_handlers`."""
    for handler in handlers:
        logging.getLogger('lakonlab').removeHandler(handler)
        handler.close()


@dataclass
class LogSettings:
    """What ``log_config`` asks for.

    Args:
        interval: Iterations between log lines; also the window over which losses are averaged.
        backends: Configs of mmengine's visualisation backends.
    """

    interval: int = 50
    backends: list[dict[str, Any]] = field(default_factory=list)


def log_settings(log_config: Mapping[str, Any] | None, work_dir: str | Path) -> LogSettings:
    """Translate the section ``log_config`` of a config.

    Args:
        log_config: ``dict(interval=..., hooks=[dict(type='TextLoggerHook'), ...])``; None for the defaults, which write
            to TensorBoard too.
        work_dir: Directory of the run's logs.

    Returns:
        Interval and backends; JSON lines are always written.

    Raises:
        ValueError: An unknown hook or argument.
    """
    log_config = dict(log_config or {})
    settings = LogSettings(log_config.pop('interval', 50))
    hooks = log_config.pop('hooks', [{'type': 'TensorboardLoggerHook'}])
    if log_config:
        raise ValueError(f"log_config: {sorted(log_config)} not known; expected 'interval' and 'hooks'")
    settings.backends.append({'type': 'LocalVisBackend', 'save_dir': str(work_dir)})
    for entry in hooks:
        options = dict(entry)
        kind = options.pop('type')
        options.pop('by_epoch', None)
        if 'interval' in options and options.pop('interval') != settings.interval:
            raise ValueError(f'log_config.hooks: {kind} has an interval of its own; set log_config.interval instead')
        if kind == 'TextLoggerHook':
            allowed, backend = set(), None
        elif kind == 'TensorboardLoggerHook':
            allowed = {'log_dir'}
            save_dir = options.get('log_dir') or os.path.join(work_dir, 'tf_logs')
            backend = {'type': 'TensorboardVisBackend', 'save_dir': save_dir}
        elif kind == 'WandbLoggerHook':
            allowed = {'init_kwargs', 'commit', 'define_metric_cfg'}
            backend = {'type': 'WandbVisBackend', 'save_dir': str(work_dir), **options}
        else:
            raise ValueError(
                f'log_config.hooks: type {kind!r} is unknown; expected TextLoggerHook, TensorboardLoggerHook or '
                'WandbLoggerHook'
            )
        unknown = sorted(set(options) - allowed)
        if unknown:
            raise ValueError(
                f'log_config.hooks: {kind} has no argument {unknown[0]!r}; expected {sorted(allowed) or "none"}'
            )
        if backend is not None:
            settings.backends.append(backend)
    return settings


def memory_megabytes(device: torch.device) -> float:
    """Peak memory of tensors on a CUDA device, or the resident memory of this process, in MB."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) / 2**20
    statm = Path('/proc/self/statm')
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE') / 2**20
    import resource  # macOS has no /proc and states the peak in bytes

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class ThroughputHook(Hook):
    """Adds iterations per second and memory to each log line; runs between mmengine's timer and its logger.

    Args:
        interval: Iterations between log lines.
    """

    priority = 55

    def __init__(self, interval: int):
        self.interval = interval

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Update the scalars, and shorten all histories to the window that is averaged."""
        step = runner.iter + 1
        if step % self.interval == 0 or step == runner.max_iters:
            seconds = runner.message_hub.get_scalar('train/time').mean(self.interval)
            runner.message_hub.update_scalar('train/it_per_s', 1 / max(float(seconds), 1e-9))
            runner.message_hub.update_scalar('train/memory_mb', memory_megabytes(runner.strategy.device))
        for buffer in runner.message_hub.log_scalars.values():
            buffer.max_length = self.interval  # unbounded histories make every update slower than the last


def log_window(message_hub: MessageHub) -> dict[str, list[list[float]]]:
    """The values that the next log line will average, as plain data."""
    return {key: [part.tolist() for part in buffer.data] for key, buffer in message_hub.log_scalars.items()}


def load_log_window(message_hub: MessageHub, window: Mapping[str, list[list[float]]], interval: int) -> None:
    """Restore :func:`log_window`, so that a line after resuming averages the same values as without interruption.

    Args:
        message_hub: A new hub.
        window: What :func:`log_window` returned.
        interval: Iterations between log lines.
    """
    for key, (values, counts) in window.items():
        values, counts = values[-interval:], counts[-interval:]
        message_hub.log_scalars[key] = HistoryBuffer(values, counts, max_length=interval)
