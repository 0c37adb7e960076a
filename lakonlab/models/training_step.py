"""One optimiser step: micro-batches, backward, clipping, and the refusal of anything that is not finite."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lakonlab.ops.random_source import RandomSource, TorchSource
from lakonlab.ops.shapes import batch_size_of, select_rows
from lakonlab.phases import phase

Around = Callable[[bool], AbstractContextManager[None]]
"""Called before a forward and backward pass with whether it is the last one; what surrounds the pass."""
Minibatch = Callable[[dict[str, Any], RandomSource, float, Around], dict[str, Tensor]]
"""Forward and backward of a micro-batch: (data, source, factor of the loss, what surrounds a pass) -> values to log."""


def alone(last: bool) -> AbstractContextManager[None]:
    """What surrounds a pass of a process that shares its step with no other: nothing."""
    return contextlib.nullcontext()


class GradientExchange:
    """What a step leaves to whoever spreads it over processes; this one is alone."""

    def clear_gradients(self, optimizers: Mapping[str, Optimizer]) -> None:
        """Forget the gradients of the step before.

        Args:
            optimizers: By key.
        """
        for optimizer in optimizers.values():
            optimizer.zero_grad(set_to_none=True)

    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        """Around a forward and backward pass; gradients are exchanged in the last one of a step only.

        Args:
            last: Whether no other pass follows in this step.
        """
        return contextlib.nullcontext()

    def gradients(self, optimizer: Optimizer) -> list[Tensor]:
        """What this process holds of the gradients of an optimiser's parameters, to be changed in place."""
        gradients = (parameter.grad for group in optimizer.param_groups for parameter in group['params'])
        return [gradient for gradient in gradients if gradient is not None]

    def conclude(
        self, optimizers: Mapping[str, Optimizer], log_vars: Mapping[str, Tensor]
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Gradient norms and the values to log, of the whole batch.

        Args:
            optimizers: By key; gradients are accumulated and exchanged.
            log_vars: Means over this process's part of the batch.

        Returns:
            Key -> L2 norm of the whole gradient, and means over the whole batch.
        """
        norms = {key: torch.nn.utils.get_total_norm(self.gradients(value)) for key, value in optimizers.items()}
        values = _to_floats({**{f'norm {key}': norm for key, norm in norms.items()}, **log_vars})
        return {key: values[f'norm {key}'] for key in norms}, {key: values[key] for key in log_vars}


@dataclass(kw_only=True)
class GradientClipping:
    """Clipping of the gradients of one optimiser."""

    max_norm: float = 0.0
    """Largest L2 norm; 0 for no clipping."""
    begin_iter: int = 0
    """First iteration that is clipped."""
    skip_ratio: float = 0.0
    """Skip the step if the norm exceeds ``max_norm * skip_ratio``; 0 for never."""

    @classmethod
    def from_section(cls, train_cfg: Mapping[str, Any], optimizer_key: str) -> GradientClipping:
        """Read ``<key>_grad_clip``, ``<key>_grad_clip_begin_iter`` and ``<key>_grad_clip_skip_ratio``."""
        prefix = f'{optimizer_key}_grad_clip'
        return cls(
            max_norm=train_cfg.get(prefix, 0.0),
            begin_iter=train_cfg.get(f'{prefix}_begin_iter', 0),
            skip_ratio=train_cfg.get(f'{prefix}_skip_ratio', 0.0),
        )


def micro_batches(batch_size: int, grad_accum_batch_size: int | None) -> list[slice]:
    """Rows of the micro-batches of a batch.

    Raises:
        ValueError: The batch is not divisible.
    """
    size = batch_size if grad_accum_batch_size is None else max(1, min(grad_accum_batch_size, batch_size))
    if batch_size % size:
        raise ValueError(
            f'train_cfg.grad_accum_batch_size={size} does not divide the batch of {batch_size}; choose a divisor'
        )
    return [slice(start, start + size) for start in range(0, batch_size, size)]


def training_step(
    data: dict[str, Any],
    optimizers: Mapping[str, Optimizer],
    minibatch: Minibatch,
    train_cfg: Mapping[str, Any],
    iteration: int,
    source: RandomSource | None = None,
    loss_scaler: torch.amp.GradScaler | None = None,
    exchange: GradientExchange | None = None,
) -> dict[str, Any]:
    """Accumulate the mean gradient of a batch and step every optimiser whose gradient is finite.

    Args:
        data: The batch; tensors and lists are split along the first dimension.
        optimizers: The optimisers by key.
        minibatch: Forward and backward of a micro-batch.
        train_cfg: Section with ``grad_accum_batch_size`` and the clipping keys.
        iteration: Number of the iteration, from 0.
        source: Source of random numbers of the whole batch.
        loss_scaler: Scaler of float16 training.
        exchange: How processes share the step; None for one process.

    Returns:
        ``log_vars`` (means over the batch and ``<key>_grad_norm`` before clipping, NaN for a skipped step),
        ``num_samples``, and ``skipped``, the keys of the optimisers that did not step.
    """
    source = source or TorchSource()
    exchange = exchange or GradientExchange()
    exchange.clear_gradients(optimizers)
    batch_size = batch_size_of(data)
    parts = micro_batches(batch_size, train_cfg.get('grad_accum_batch_size'))
    totals: dict[str, Tensor] = {}
    for rows in parts:
        part = data if len(parts) == 1 else select_rows(data, rows)

        def around(last: bool, rows: slice = rows) -> AbstractContextManager[None]:
            return exchange.accumulating(last and rows is parts[-1])

        logs = minibatch(part, source.rows(rows.start, rows.stop - rows.start), 1 / len(parts), around)
        totals = {**totals, **{key: totals.get(key, 0) + value for key, value in logs.items()}}

    with phase('optimiser'):
        return _update(optimizers, totals, len(parts), batch_size, train_cfg, iteration, loss_scaler, exchange)


def _update(
    optimizers: Mapping[str, Optimizer],
    totals: Mapping[str, Tensor],
    num_parts: int,
    batch_size: int,
    train_cfg: Mapping[str, Any],
    iteration: int,
    loss_scaler: torch.amp.GradScaler | None,
    exchange: GradientExchange,
) -> dict[str, Any]:
    """Exchange, clip and step; see :func:`training_step`."""
    if loss_scaler is not None:
        for optimizer in optimizers.values():
            loss_scaler.unscale_(optimizer)
    norms, log_vars = exchange.conclude(optimizers, {key: value / num_parts for key, value in totals.items()})
    log_vars.update({f'{key}_grad_norm': norm for key, norm in norms.items()})

    loss_is_finite = all(math.isfinite(value) for key, value in log_vars.items() if key.startswith('loss'))
    skipped = []
    for key, optimizer in optimizers.items():
        clipping = GradientClipping.from_section(train_cfg, key)
        norm = norms[key]
        is_clipped = clipping.max_norm > 0 and iteration >= clipping.begin_iter
        is_outlier = is_clipped and 0 < clipping.skip_ratio < norm / clipping.max_norm
        if not loss_is_finite or not math.isfinite(norm) or is_outlier:
            optimizer.zero_grad(set_to_none=True)
            log_vars[f'{key}_grad_norm'] = math.nan
            skipped.append(key)
        else:
            if is_clipped:
                _clip(exchange.gradients(optimizer), clipping.max_norm, norm)
            if loss_scaler is None:
                optimizer.step()
            else:
                loss_scaler.step(optimizer)
    if loss_scaler is not None:
        loss_scaler.update()
    return {'log_vars': log_vars, 'num_samples': batch_size, 'skipped': tuple(skipped)}


def _clip(gradients: list[Tensor], max_norm: float, norm: float) -> None:
    factor = max_norm / (norm + 1e-6)  # the floor that torch.nn.utils.clip_grad_norm_ uses
    if factor < 1:
        torch._foreach_mul_(gradients, factor)


def _to_floats(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Move all values to the host at once, so that a step waits for the device only once."""
    if not values:
        return {}
    device = next((value.device for value in values.values() if value.device.type != 'cpu'), torch.device('cpu'))
    dtype = torch.float32 if device.type == 'mps' else torch.float64
    stacked = torch.stack([value.detach().to(device=device, dtype=dtype).reshape(()) for value in values.values()])
    return dict(zip(values, stacked.tolist()))
