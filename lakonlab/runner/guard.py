"""Ends a run that no longer makes steps."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence

logger = logging.getLogger(__name__)


class TrainingDivergedError(RuntimeError):
    """Too many iterations in a row had a loss or gradient that is not finite, or a gradient far too large."""


class SkipGuard:
    """Counts iterations whose optimiser step was skipped.

    Args:
        max_skipped_iters: Skipped iterations in a row that end the run, at least 1.
    """

    def __init__(self, max_skipped_iters: int = 20):
        if max_skipped_iters < 1:
            raise ValueError(f'runner.max_skipped_iters={max_skipped_iters}: expected at least 1')
        self.max_skipped_iters = max_skipped_iters
        self.in_a_row = 0
        self.total = 0

    def update(
        self, iteration: int, skipped: Sequence[str], log_vars: Mapping[str, float], lr: Mapping[str, float]
    ) -> None:
        """Take note of one iteration.

        Args:
            iteration: From 0.
            skipped: Keys of the optimisers that made no step.
            log_vars: Losses and other figures of the iteration.
            lr: Learning rate by optimiser key.

        Raises:
            TrainingDivergedError: The limit is reached.
        """
        if not skipped:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        self.total += 1
        bad = [f'{key}={value}' for key, value in log_vars.items() if 'loss' in key and not math.isfinite(value)]
        what = 'gradient not finite, or larger than grad_clip_skip_ratio allows'
        if bad:
            what = f'not finite: {", ".join(bad)}'
        rates = ', '.join(f'{key} {value:.3e}' for key, value in lr.items())
        logger.warning(
            'iteration %d: no step for %s (%s; lr %s); %d skipped in a row, %d in all',
            iteration + 1,
            ', '.join(skipped),
            what,
            rates,
            self.in_a_row,
            self.total,
        )
        if self.in_a_row >= self.max_skipped_iters:
            raise TrainingDivergedError(
                f'{self.in_a_row} iterations in a row made no step; the last is iteration {iteration + 1} with lr '
                f'{rates}, {what}. The checkpoints saved so far are untouched. Lower the learning rate '
                '(optimizer.*.lr), lengthen the warm-up (lr_config.warmup_iters), clip gradients '
                '(train_cfg.diffusion_grad_clip), or check the data for values that are not finite, and run again; '
                'runner.max_skipped_iters sets how many are tolerated.'
            )

    def state_dict(self) -> dict[str, int]:
        """The counts, as plain data."""
        return {'in_a_row': self.in_a_row, 'total': self.total}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Restore the counts."""
        self.in_a_row, self.total = state['in_a_row'], state['total']
