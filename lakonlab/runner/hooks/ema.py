"""Exponential moving averages of trained modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lakonlab.mmengine_parts import Hook
from lakonlab.models.architecture.roles import named_state
from lakonlab.parallel.state import local_part
from lakonlab.registry import HOOKS


def fixed_momentum(iteration: int, start_iter: int, momentum: float = 0.999) -> float:
    """The same momentum at every iteration."""
    return momentum


def rampup_momentum(
    iteration: int,
    start_iter: int,
    ema_kimg: float = 10,
    ema_rampup: float = 0.05,
    batch_size: int = 4,
    eps: float = 1e-8,
) -> float:
    """Half-life of ``ema_kimg`` thousand images, shorter at the start (Karras et al., StyleGAN2-ADA, 2020)."""
    half_life = min(ema_kimg * 1000, (iteration + 1) * batch_size * ema_rampup)
    return 0.5 ** (batch_size / max(half_life, eps))


def karras_momentum(iteration: int, start_iter: int, gamma: float = 7.0, max_momentum: float = 1.0) -> float:
    """Power-law average: ``(1 - 1 / t) ** (gamma + 1)`` (Karras et al., arXiv:2312.02696, Eq. 127)."""
    t = max(iteration + 1 - start_iter, 1)
    return min((1 - 1 / t) ** (gamma + 1), max_momentum)


MOMENTUM_POLICIES = {'fixed': fixed_momentum, 'rampup': rampup_momentum, 'karras': karras_momentum}


@HOOKS.register_module()
class ExponentialMovingAverageHook(Hook):
    """Keeps ``<module>_ema`` an average of ``<module>``: ``ema = net + momentum * (ema - net)`` after each step.

    Before ``start_iter`` the average is a plain copy. Buffers are always copied.

    Args:
        module_keys: Paths of the averages in the model; each ends in ``_ema``.
        interp_mode: Only ``lerp``.
        interval: Iterations between updates, counted from ``start_iter``.
        start_iter: First iteration of averaging.
        trainable_only: Leave parameters alone whose source requires no gradient.
        momentum_policy: ``fixed``, ``rampup`` or ``karras``.
        momentum_cfg: Arguments of the policy's function in this module.

    Raises:
        ValueError: An unknown policy or mode, or a key that does not end in ``_ema``.
        TypeError: ``momentum_cfg`` does not fit the policy.
    """

    priority = 'VERY_HIGH'

    def __init__(
        self,
        module_keys: Sequence[str] = ('diffusion_ema',),
        interp_mode: str = 'lerp',
        interval: int = 1,
        start_iter: int = 0,
        trainable_only: bool = True,
        momentum_policy: str = 'fixed',
        momentum_cfg: Mapping[str, Any] | None = None,
    ):
        module_keys = (module_keys,) if isinstance(module_keys, str) else tuple(module_keys)
        for key in module_keys:
            if not key.endswith('_ema'):
                raise ValueError(f"module_keys: {key!r} must end in '_ema'; the rest names the module it averages")
        if interp_mode != 'lerp':
            raise ValueError(f"interp_mode={interp_mode!r} is unknown; expected 'lerp'")
        if momentum_policy not in MOMENTUM_POLICIES:
            raise ValueError(f'momentum_policy={momentum_policy!r} is unknown; choose one of {list(MOMENTUM_POLICIES)}')
        if interval < 1:
            raise ValueError(f'interval={interval}: expected at least 1')
        self.module_keys = module_keys
        self.interval = interval
        self.start_iter = start_iter
        self.trainable_only = trainable_only
        self.momentum_policy = momentum_policy
        self.momentum_cfg = dict(momentum_cfg or {})
        self.momentum(0)

    def momentum(self, iteration: int) -> float:
        """The weight of the old average after an iteration's step; 0 copies.

        Args:
            iteration: From 0.
        """
        if iteration < self.start_iter:
            return 0.0
        return MOMENTUM_POLICIES[self.momentum_policy](iteration, self.start_iter, **self.momentum_cfg)

    def before_train(self, runner) -> None:
        """Find the tensors to average, before the first iteration."""
        self._averages, self._values, self._buffers = [], [], []
        for average, source in self._pairs(runner.model):
            of_average, of_source = dict(named_state(average)), dict(named_state(source))
            for name, value in of_source.items():
                if of_average[name] is value:  # frozen, and shared by both
                    continue
                if not isinstance(value, nn.Parameter):
                    self._buffers.append((of_average[name], value))
                elif value.requires_grad or not self.trainable_only:
                    self._averages.append(of_average[name])
                    self._values.append(value)

    @torch.no_grad()
    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Update the averages if this iteration is one that does."""
        since_start = runner.iter + 1 - self.start_iter
        if runner.iter >= self.start_iter and since_start % self.interval != 0:
            return
        averages = [local_part(average.detach()) for average in self._averages]
        values = [local_part(value.detach()).to(average.dtype) for average, value in zip(averages, self._values)]
        held = [position for position, average in enumerate(averages) if average.numel()]
        if held:
            chosen = ([tensors[position] for position in held] for tensors in (averages, values))
            torch._foreach_lerp_(*chosen, 1 - self.momentum(runner.iter))
        for average, value in self._buffers:
            average.copy_(value)

    def _pairs(self, model: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
        try:
            return [
                (model.get_submodule(key), model.get_submodule(key.removesuffix('_ema'))) for key in self.module_keys
            ]
        except AttributeError as error:
            raise ValueError(
                f'ExponentialMovingAverageHook.module_keys={self.module_keys}: {error}; the model needs '
                'diffusion_use_ema=True'
            ) from error
