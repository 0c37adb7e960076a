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
from torch import Tensor

from lakonlab.mmengine_parts import HistoryBuffer, Hook, LogProcessor, MessageHub
from lakonlab.phases import PHASES, active_clock
from lakonlab.storage.paths import is_remote

LOG_FORMAT = '%(asctime)s - %(levelname)s - %(message)s'
SHARE = 'share_'
SHORT_FIGURES = ('it_per_s', 'samples_per_s', 'tokens_per_s', 'memory_mb')


def attach_log_handlers(
    log_file: Path, level: str = 'INFO', console: bool = True, rank: int = 0, all_ranks: bool = False
) -> list[logging.Handler]:
    """Send what the package logs to a file and to the console.

    Args:
        log_file: Appended to by rank 0.
        level: Least level that is reported.
        console: Whether to write to standard output too.
        rank: Number of this process. Others than 0 write warnings and errors to the console, with their rank, and
            nothing to ``log_file``.
        all_ranks: Whether others than 0 write a file of their own, ``<stem of log_file>_rank<N>.log``; at level
            ``'DEBUG'`` they always do.

    Returns:
        The handlers, for :func:`detach_log_handlers`.
    """
    handlers: list[logging.Handler] = []
    if rank == 0 or all_ranks or level == 'DEBUG':
        own_file = log_file if rank == 0 else log_file.with_name(f'{log_file.stem}_rank{rank}{log_file.suffix}')
        handlers.append(logging.FileHandler(own_file, encoding='utf-8'))
        handlers[-1].setFormatter(logging.Formatter(LOG_FORMAT))
    if console:
        handlers.append(logging.StreamHandler(sys.stdout))
        handlers[-1].setFormatter(logging.Formatter(LOG_FORMAT if rank == 0 else f'rank {rank}: {LOG_FORMAT}'))
        if rank != 0:
            handlers[-1].setLevel(logging.WARNING)
    package_logger = logging.getLogger('lakonlab')
    package_logger.setLevel(level)
    for handler in handlers:
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
        all_ranks: Whether every process writes a log file of its own.
    """

    interval: int = 50
    backends: list[dict[str, Any]] = field(default_factory=list)
    all_ranks: bool = False


def log_settings(log_config: Mapping[str, Any] | None, work_dir: str | Path) -> LogSettings:
    """Translate the section ``log_config`` of a config.

    Args:
        log_config: ``dict(interval=..., hooks=[dict(type='TextLoggerHook'), ...], all_ranks=...)``; None for the
            defaults, which write to TensorBoard too.
        work_dir: Directory of the run's logs.

    Returns:
        Interval and backends; JSON lines are always written.

    Raises:
        ValueError: An unknown hook or argument.
    """
    log_config = dict(log_config or {})
    settings = LogSettings(log_config.pop('interval', 50), all_ranks=log_config.pop('all_ranks', False))
    hooks = log_config.pop('hooks', [{'type': 'TensorboardLoggerHook'}])
    if log_config:
        raise ValueError(f"log_config: {sorted(log_config)} not known; expected 'interval', 'hooks' and 'all_ranks'")
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
            if is_remote(save_dir):
                raise ValueError(
                    f'log_config.hooks: log_dir={save_dir!r} is not local; leave it out, and set work_dir_mirror to '
                    'have all logs copied to a remote directory'
                )
            backend = {'type': 'TensorboardVisBackend', 'save_dir': save_dir}
        elif kind == 'WandbLoggerHook':
            from lakonlab.runner import wandb_log  # noqa: F401 - registers it

            allowed = {'init_kwargs', 'define_metric_cfg'}
            backend = {'type': 'WandbBackend', 'save_dir': str(work_dir), **options}
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
    """The most memory so far, in MB: of tensors on a CUDA device, of this whole process on another one."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource  # not on Windows

    unit = 1 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def count_text_tokens(data_batch: Mapping[str, Any] | None) -> int:
    """Tokens of the prompts that a batch brings embedded, without padding where it has a mask; 0 if it has none.

    Args:
        data_batch: A batch before it is copied to a device.
    """
    embedded = (data_batch or {}).get('prompt_embed_kwargs') or {}
    states, mask = embedded.get('encoder_hidden_states'), embedded.get('encoder_hidden_states_mask')
    if mask is not None:
        return int(mask.count_nonzero())
    return states.shape[0] * states.shape[1] if isinstance(states, Tensor) else 0


class ThroughputHook(Hook):
    """Adds speed, memory and the shares of time to each log line; runs between mmengine's timer and its logger.

    ``it_per_s``; ``samples_per_s`` (images, in most runs) and ``tokens_per_s`` (of embedded prompts, as many on every
    process as on this one) over all processes; ``memory_mb`` of this process; and ``share_<phase>``, what share of this
    process's time since the last line each phase took, see :mod:`lakonlab.phases`.

    Args:
        interval: Iterations between log lines.
    """

    priority = 55

    def __init__(self, interval: int):
        self.interval = interval
        self._tokens = self._iterations = 0

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Update the scalars, and shorten all histories to the window that is averaged."""
        step, hub = runner.iter + 1, runner.message_hub
        self._tokens += count_text_tokens(data_batch)
        self._iterations += 1
        if step % self.interval == 0 or step == runner.max_iters:
            iterations_per_second = 1 / max(float(hub.get_scalar('train/time').mean(self.interval)), 1e-9)
            hub.update_scalar('train/it_per_s', iterations_per_second)
            hub.update_scalar('train/samples_per_s', runner.batch_size * iterations_per_second)
            if self._tokens:
                tokens = self._tokens / self._iterations * runner.world_size
                hub.update_scalar('train/tokens_per_s', tokens * iterations_per_second)
            hub.update_scalar('train/memory_mb', memory_megabytes(runner.strategy.device))
            self._tokens = self._iterations = 0
            clock = active_clock()
            if clock is not None:
                for name, share in {**dict.fromkeys(PHASES, 0.0), **clock.shares()}.items():
                    hub.update_scalar(f'train/{SHARE}{name}', share)
                clock.restart()
        for buffer in hub.log_scalars.values():
            buffer.max_length = self.interval  # unbounded histories make every update slower than the last


class LineProcessor(LogProcessor):
    """Makes mmengine's log line shorter: rates with few digits, and shares of time as one list of percentages."""

    def get_log_after_iter(self, runner, batch_idx: int, mode: str) -> tuple[dict[str, Any], str]:
        """See the base class.

        Returns:
            The scalars for the backends, unchanged, and the line.
        """
        scalars, line = super().get_log_after_iter(runner, batch_idx, mode)
        return scalars, compact_line(line, scalars)


def compact_line(line: str, scalars: Mapping[str, float]) -> str:
    """A log line whose rates have four digits and whose shares stand together at its end.

    Args:
        line: Items ``name: value`` with two spaces between them.
        scalars: The values by name.

    Returns:
        The line with ``share: teacher 62 %, student 30 %, ...`` in place of the single shares; those that round to 0 %
        are left out.
    """
    items = []
    for item in line.split('  '):
        name = item.split(':')[0]
        if name in SHORT_FIGURES and name in scalars:
            item = f'{name}: {scalars[name]:.4g}' if scalars[name] < 1000 else f'{name}: {scalars[name]:.0f}'
        if name.startswith(SHARE) or (name == 'memory' and 'memory_mb' in scalars):
            continue  # on CUDA, mmengine adds what memory_mb says already
        items.append(item)
    shares = {name.removeprefix(SHARE): value for name, value in scalars.items() if name.startswith(SHARE)}
    parts = [f'{name} {value:.0%}'.replace('%', ' %') for name, value in shares.items() if value >= 0.005]
    return '  '.join([*items, f'share: {", ".join(parts)}'] if parts else items)


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
