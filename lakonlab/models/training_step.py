"""One optimiser step: micro-batches, backward, clipping, and the refusal of anything that is not finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lakonlab.ops.random_source import RandomSource, TorchSource
from lakonlab.ops.shapes import batch_size_of, select_rows

Minibatch = Callable[[dict[str, Any], RandomSource, float], dict[str, Tensor]]
"""Forward and backward of a micro-batch: (data, source, factor of the loss) -> values to log."""


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

    Returns:
        ``log_vars`` (means over the micro-batches and ``<key>_grad_norm`` before clipping, NaN for a skipped step),
        ``num_samples``, and ``skipped``, the keys of the optimisers that did not step.
    """
    source = source or TorchSource()
    for optimizer in optimizers.values():
        optimizer.zero_grad(set_to_none=True)
    batch_size = batch_size_of(data)
    parts = micro_batches(batch_size, train_cfg.get('grad_accum_batch_size'))
    totals: dict[str, Tensor] = {}
    for rows in parts:
        part = data if len(parts) == 1 else select_rows(data, rows)
        logs = minibatch(part, source.rows(rows.start, rows.stop - rows.start), 1 / len(parts))
        totals = {**totals, **{key: totals.get(key, 0) + value for key, value in logs.items()}}

    norms = {}
    for key, optimizer in optimizers.items():
        if loss_scaler is not None:
            loss_scaler.unscale_(optimizer)
        norms[f'{key}_grad_norm'] = torch.nn.utils.get_total_norm(_gradients(optimizer))
    log_vars = _to_floats({**{key: value / len(parts) for key, value in totals.items()}, **norms})

    loss_is_finite = all(math.isfinite(value) for key, value in log_vars.items() if key.startswith('loss'))
    skipped = []
    for key, optimizer in optimizers.items():
        clipping = GradientClipping.from_section(train_cfg, key)
        norm = log_vars[f'{key}_grad_norm']
        is_clipped = clipping.max_norm > 0 and iteration >= clipping.begin_iter
        is_outlier = is_clipped and 0 < clipping.skip_ratio < norm / clipping.max_norm
        if not loss_is_finite or not math.isfinite(norm) or is_outlier:
            optimizer.zero_grad(set_to_none=True)
            log_vars[f'{key}_grad_norm'] = math.nan
            skipped.append(key)
        else:
            if is_clipped:
                _clip(_gradients(optimizer), clipping.max_norm, norm)
            if loss_scaler is None:
                optimizer.step()
            else:
                loss_scaler.step(optimizer)
    if loss_scaler is not None:
        loss_scaler.update()
    return {'log_vars': log_vars, 'num_samples': batch_size, 'skipped': tuple(skipped)}


def _gradients(optimizer: Optimizer) -> list[Tensor]:
    return [p.grad for group in optimizer.param_groups for p in group['params'] if p.grad is not None]


def _clip(gradients: list[Tensor], max_norm: float, norm: float) -> None:
    factor = max_norm / (norm + 1e-6)  # the floor that torch.nn.utils.clip_grad_norm_ uses
    if factor < 1:
        torch._foreach_mul_(gradients, factor)


def _to_floats(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Move all values to the host at once, so that a step waits for the device only once."""
    if not values:
        return {}
    device = next((value.device for value in values.values() if value.device.type != 'cpu'), torch.device('cpu'))
    dtype = torch.float64 if device.type == 'cpu' else torch.float32
    stacked = torch.stack([value.detach().to(device=device, dtype=dtype).reshape(()) for value in values.values()])
    return dict(zip(values, stacked.tolist()))
