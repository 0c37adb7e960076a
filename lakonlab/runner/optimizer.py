"""Optimisers from the section ``optimizer`` of a config."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lakonlab.models.architecture.roles import parameter_names

BITSANDBYTES_SUFFIX = '8bit'
BITSANDBYTES_SUFFIXES = (BITSANDBYTES_SUFFIX, '32bit')


def optimizer_class(name: str) -> type[Optimizer]:
    """The optimiser of a name: torch's own, or bitsandbytes' for names ending in ``8bit`` or ``32bit``.

    Raises:
        ValueError: There is no such optimiser.
        ImportError: It is one of bitsandbytes', which is not installed.
    """
    found = getattr(torch.optim, name, None)
    if inspect.isclass(found) and issubclass(found, Optimizer) and found is not Optimizer:
        return found
    if name.endswith(BITSANDBYTES_SUFFIXES):
        try:
            import bitsandbytes.optim as optim
        except ImportError as error:
            plain = name.removesuffix(BITSANDBYTES_SUFFIX)
            instead = f' Without it, use {plain!r}.' if hasattr(torch.optim, plain) else ''
            raise ImportError(
                f'optimizer type {name!r} needs bitsandbytes: pip install bitsandbytes.{instead}'
            ) from error
        if hasattr(optim, name):
            return getattr(optim, name)
    known = sorted(
        key for key, value in vars(torch.optim).items() if inspect.isclass(value) and issubclass(value, Optimizer)
    )
    raise ValueError(f'optimizer type {name!r} is unknown; torch.optim has {", ".join(known)}')


def build_optimizers(model: nn.Module, config: Mapping[str, Mapping[str, Any]]) -> dict[str, Optimizer]:
    """One optimiser per entry; a key names the submodule that it trains.

    Args:
        model: The whole model.
        config: Submodule path -> ``dict(type=..., lr=..., paramwise_cfg=dict(custom_keys={pattern: dict(lr_mult=...,
            decay_mult=...)}), ...)``; of several patterns contained in a parameter's name the longest counts.

    Returns:
        The optimisers; each parameter group has ``initial_lr``, the base of its schedule.

    Raises:
        ValueError: A submodule or optimiser does not exist, an argument is wrong, or nothing is trainable.
    """
    return {key: _build(model, key, dict(options)) for key, options in config.items()}


def _build(model: nn.Module, key: str, options: dict[str, Any]) -> Optimizer:
    try:
        module = model.get_submodule(key)
    except AttributeError:
        children = ', '.join(name for name, _ in model.named_children())
        raise ValueError(f'optimizer[{key!r}]: the model has no submodule {key!r}; it has {children}') from None
    kind = optimizer_class(options.pop('type'))
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
    if _can_be_fused(kind, options, parameter_groups):
        options['fused'] = True
    try:
        optimizer = kind(parameter_groups, **options)
    except TypeError as error:
        known = ', '.join(list(inspect.signature(kind).parameters)[1:])
        raise ValueError(f'optimizer[{key!r}]: {error}; {kind.__name__} takes {known}') from error
    for group in optimizer.param_groups:
        group['initial_lr'] = float(group['lr'])
    return optimizer


def _can_be_fused(kind: type[Optimizer], options: Mapping[str, Any], groups: list[dict[str, Any]]) -> bool:
    """Whether torch can update all parameters in one kernel; it never does so without being asked."""
    if 'fused' not in inspect.signature(kind).parameters or 'fused' in options or options.get('foreach'):
        return False
    devices = {parameter.device.type for group in groups for parameter in group['params']}
    return len(devices) == 1 and devices <= {'cpu', 'cuda'}


def _default_weight_decay(kind: type[Optimizer]) -> float:
    parameter = inspect.signature(kind).parameters.get('weight_decay')
    return 0.0 if parameter is None else parameter.default
