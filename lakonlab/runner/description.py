"""What a run is, in words."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lakonlab.mmengine_parts import get_priority
from lakonlab.models.architecture.roles import parameter_names

if TYPE_CHECKING:
    from lakonlab.runner.runner import Runner


def describe(runner: Runner) -> str:
    """What a reader of the log wants to know before the first iteration.

    Args:
        runner: The run.

    Returns:
        Lines.
    """
    groups = [group for optimizer in runner.optimizers.values() for group in optimizer.param_groups]
    trained = {parameter for group in groups for parameter in group['params']}
    trainable = sum(
        runner.strategy.pieces(name, parameter).size().numel()
        for parameter, name in parameter_names(runner.model).items()
        if parameter in trained
    )
    mirror = runner.cfg.get('work_dir_mirror')
    checkpoints = runner.checkpoint_dir if runner.checkpoint_hook else 'none (checkpoint_config is not set)'
    sizes = runner.order.bucket_sizes
    buckets = f' in {len(sizes)} buckets of {min(sizes):,} to {max(sizes):,}' if len(sizes) > 1 else ''
    rows = [f'{get_priority(hook.priority):>4}  {type(hook).__name__}' for hook in runner.hooks]
    return '\n'.join(
        [
            f'run {Path(runner.work_dir).absolute().name}',
            f'  logs         {runner.work_dir}{f", copied to {mirror}" if mirror else ""}',
            f'  checkpoints  {checkpoints}',
            f'  device       {runner.strategy.device}, {runner.world_size} process(es), {runner.strategy.name}, '
            f'{torch.get_num_threads()} threads',
            f'  trainable    {trainable:,} parameters',
            f'  data         {len(runner.dataset):,} samples{buckets}, global batch {runner.batch_size}',
            f'  length       {runner.max_iters:,} iterations, {runner.max_iters * runner.batch_size:,} samples, '
            f'{runner.max_iters * runner.batch_size / len(runner.dataset):.1f} epochs',
            f'  seed         {runner.seed}',
            '  hooks, in the order they are called:',
            *rows,
        ]
    )
