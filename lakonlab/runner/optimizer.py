"""Optimisers from the section ``optimizer`` of a config."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lakonlab.models.architecture.roles import parameter_names
from lakonlab.parallel.optimizer_classes import (
    OptimizerClasses,
    can_fuse,
    named_class,
    optimizer_of_whole,
)


def build_optimizers(
    model: nn.Module, config: Mapping[str, Mapping[str, Any]], classes: OptimizerClasses = optimizer_of_whole
) -> dict[str, Optimizer]:
    """One optimiser per entry; a key names the submodule that it trains.

    Args:
        model: The whole model.
        config: Submodule path -> ``dict(type=..., lr=..., paramwise_cfg=dict(custom_keys={pattern: dict(lr_mult=...,
            decay_mult=...)}), ...)``; of several patterns contained in a parameter's name the longest counts.
        classes: What names of optimisers mean, a strategy's ``optimizer_class``.

    Returns:
        The optimisers; each parameter group has ``initial_lr``, the base of its schedule.

    Raises:
        ValueError: A submodule or optimiser does not exist, an argument is wrong, or nothing is trainable.
        ImportError: An optimiser's package is not installed.
    """
    return {key: _build(model, key, dict(options), classes) for key, options in config.items()}


def _build(model: nn.Module, key: str, options: dict[str, Any], classes: OptimizerClasses) -> Optimizer:
    try:
        module = model.get_submodule(key)
    except AttributeError:
        children = ', '.join(name for name, _ in model.named_children())
        raise ValueError(f'optimizer[{key!r}]: the model has no submodule {key!r}; it has {children}') from None
    kind = named_class(key, options.pop('type'), classes)
    paramwise = dict(options.pop('paramwise_cfg', None) or {})
    custom_keys = paramwise.pop('custom_keys', {})
    if paramwise:
        raise ValueError(f"optimizer[{key!r}].paramwise_cfg: {sorted(paramwise)} not known; expected 'custom_keys'")
    for pattern, multipliers in custom_keys.items():
        unknown = sorted(set(multipliers) - {'lr_mult', 'decay_mult'})
        if unknown:
            raise ValueError(
                f'optimizer[{key!r}].paramwise_cfg.custom_keys[{pattern!r}]: {unknown} not known; '
                "expected 'lr_mult' and 'decay_mult'"
            )
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    patterns = sorted(sorted(custom_keys), key=len, reverse=True)
    for parameter, name in parameter_names(module).items():
        if parameter.requires_grad:
            pattern = next((pattern for pattern in patterns if pattern in f'{key}.{name}'), None)
            multipliers = custom_keys.get(pattern, {})
            pair = (multipliers.get('lr_mult', 1.0), multipliers.get('decay_mult', 1.0))
            groups.setdefault(pair, []).append(parameter)
    if not groups:
        raise ValueError(f'optimizer[{key!r}]: no parameter of {key!r} requires a gradient; check freeze options')
    parameter_groups = []
    for (lr_mult, decay_mult), parameters in groups.items():
        group: dict[str, Any] = {'params': parameters}
        if lr_mult != 1:
            group['lr'] = options['lr'] * lr_mult
        if decay_mult != 1:
            group['weight_decay'] = options.get('weight_decay', _default_weight_decay(kind)) * decay_mult
        parameter_groups.append(group)
    if options.get('fused') and not can_fuse(kind, [p for parameters in groups.values() for p in parameters]):
        raise ValueError(
            f'optimizer[{key!r}].fused=True: torch has no {kind.__name__} that updates parameters divided by rows in '
            'one kernel; expected fused=False, or no fused at all'
        )
    if _can_be_fused(kind, options, parameter_groups):
        options['fused'] = True
    try:
        optimizer = kind(parameter_groups, **options)
    except TypeError as error:
        known = ', '.join(list(inspect.signature(kind).parameters)[1:])
        raise ValueError(f'optimizer[{key!r}]: {error}; {kind.__name__} takes {known}') from error
    except (ValueError, RuntimeError) as error:
        raise ValueError(f'optimizer[{key!r}]: {error}') from error
    for group in optimizer.param_groups:
        group['initial_lr'] = float(group['lr'])
    return optimizer


def _can_be_fused(kind: type[Optimizer], options: Mapping[str, Any], groups: list[dict[str, Any]]) -> bool:
    """Whether torch can update all parameters in one kernel; it never does so without being asked."""
    if 'fused' not in inspect.signature(kind).parameters or 'fused' in options:
        return False
    if options.get('foreach') or options.get('differentiable'):
        return False
    parameters = [parameter for group in groups for parameter in group['params']]
    devices = {parameter.device.type for parameter in parameters}
    return len(devices) == 1 and devices <= {'cpu', 'cuda'} and can_fuse(kind, parameters)


def _default_weight_decay(kind: type[Optimizer]) -> float:
    parameter = inspect.signature(kind).parameters.get('weight_decay')
    return 0.0 if parameter is None else parameter.default
