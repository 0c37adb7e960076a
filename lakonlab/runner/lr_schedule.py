"""Learning rate as a pure function of the iteration.

Policies and warm-up have the names and meanings that ``lr_config`` has in mmcv, counted in iterations.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence


def fixed(base: float, iteration: int, max_iters: int) -> float:
    """The base learning rate throughout."""
    return base


def step(
    base: float,
    iteration: int,
    max_iters: int,
    step: int | Sequence[int],
    gamma: float = 0.1,
    min_lr: float | None = None,
) -> float:
    """Multiply by ``gamma`` every ``step`` iterations, or at each of the iterations listed; not below ``min_lr``."""
    drops = iteration // step if isinstance(step, int) else sum(iteration >= milestone for milestone in step)
    value = base * gamma**drops
    return value if min_lr is None else max(value, min_lr)


def exp(base: float, iteration: int, max_iters: int, gamma: float) -> float:
    """Multiply by ``gamma`` at every iteration."""
    return base * gamma**iteration


def poly(base: float, iteration: int, max_iters: int, power: float = 1.0, min_lr: float = 0.0) -> float:
    """Fall to ``min_lr`` as ``(1 - iteration / max_iters) ** power``."""
    return (base - min_lr) * (1 - iteration / max_iters) ** power + min_lr


def inv(base: float, iteration: int, max_iters: int, gamma: float, power: float = 1.0) -> float:
    """Fall as ``(1 + gamma * iteration) ** -power``."""
    return base * (1 + gamma * iteration) ** -power


def cosine_annealing(
    base: float, iteration: int, max_iters: int, min_lr: float | None = None, min_lr_ratio: float | None = None
) -> float:
    """Fall along half a cosine to ``min_lr``, or to ``min_lr_ratio`` times the base; exactly one of them is given."""
    target = _cosine_target(base, min_lr, min_lr_ratio)
    return _cosine(base, target, iteration / max_iters)


def flat_cosine_annealing(
    base: float,
    iteration: int,
    max_iters: int,
    start_percent: float = 0.75,
    min_lr: float | None = None,
    min_lr_ratio: float | None = None,
) -> float:
    """Stay flat for a share ``start_percent`` of the run, then fall like :func:`cosine_annealing`."""
    target = _cosine_target(base, min_lr, min_lr_ratio)
    start = round(max_iters * start_percent)
    return base if iteration < start else _cosine(base, target, (iteration - start) / (max_iters - start))


def _cosine_target(base: float, min_lr: float | None, min_lr_ratio: float | None) -> float:
    if (min_lr is None) == (min_lr_ratio is None):
        raise ValueError('lr_config: give exactly one of min_lr and min_lr_ratio')
    return base * min_lr_ratio if min_lr is None else min_lr


def _cosine(start: float, end: float, fraction: float) -> float:
    return end + 0.5 * (start - end) * (math.cos(math.pi * fraction) + 1)


POLICIES: dict[str, Callable[..., float]] = {
    'fixed': fixed,
    'step': step,
    'exp': exp,
    'poly': poly,
    'inv': inv,
    'CosineAnnealing': cosine_annealing,
    'FlatCosineAnnealing': flat_cosine_annealing,
}


class LearningRateSchedule:
    """The section ``lr_config`` of a config, as a function.

    Args:
        max_iters: Total iterations of the run.
        policy: A name in :data:`POLICIES`; case does not matter.
        warmup: ``linear``, ``constant``, ``exp``, or None for no warm-up.
        warmup_iters: Iterations of warm-up, at least 1 if there is one.
        warmup_ratio: Factor of the learning rate at the start, in (0, 1].
        by_epoch: Only False: schedules count iterations.
        **policy_args: Arguments of the policy.

    Raises:
        ValueError: An unknown policy, warm-up or argument, or a value out of range.
    """

    def __init__(
        self,
        max_iters: int,
        policy: str = 'fixed',
        warmup: str | None = None,
        warmup_iters: int = 0,
        warmup_ratio: float = 0.1,
        by_epoch: bool = False,
        **policy_args,
    ):
        by_lower_name = {name.lower(): function for name, function in POLICIES.items()}
        if policy.lower() not in by_lower_name:
            raise ValueError(f'lr_config.policy={policy!r} is unknown; choose one of {", ".join(POLICIES)}')
        if by_epoch:
            raise ValueError('lr_config.by_epoch=True: schedules count iterations here; remove it and give iterations')
        if warmup not in (None, 'linear', 'constant', 'exp'):
            raise ValueError(f"lr_config.warmup={warmup!r} is unknown; choose 'linear', 'constant', 'exp' or None")
        if warmup is not None and warmup_iters < 1:
            raise ValueError(f'lr_config.warmup_iters={warmup_iters}: a warm-up needs at least 1 iteration')
        if not 0 < warmup_ratio <= 1:
            raise ValueError(f'lr_config.warmup_ratio={warmup_ratio}: expected a number in (0, 1]')
        self._policy = by_lower_name[policy.lower()]
        known = list(inspect.signature(self._policy).parameters)[3:]
        unknown = sorted(set(policy_args) - set(known))
        if unknown:
            raise ValueError(f'lr_config: policy {policy!r} has no argument {unknown[0]!r}; it takes {known or "none"}')
        self.max_iters = max_iters
        self.policy_args = policy_args
        self.warmup, self.warmup_iters, self.warmup_ratio = warmup, warmup_iters, warmup_ratio
        try:
            self(1.0, 0)
        except TypeError as error:
            raise ValueError(f'lr_config: policy {policy!r}: {error}') from error

    def __call__(self, base: float, iteration: int) -> float:
        """The learning rate of one iteration.

        Args:
            base: Learning rate in the optimiser's config, times the group's multiplier.
            iteration: From 0.
        """
        value = self._policy(base, iteration, self.max_iters, **self.policy_args)
        if self.warmup is None or iteration >= self.warmup_iters:
            return value
        if self.warmup == 'constant':
            return value * self.warmup_ratio
        remaining = 1 - iteration / self.warmup_iters
        if self.warmup == 'linear':
            return value * (1 - remaining * (1 - self.warmup_ratio))
        return value * self.warmup_ratio**remaining
