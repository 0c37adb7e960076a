"""Which parameters of a network train, and in which precision the trainable ones compute."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import nullcontext
from difflib import get_close_matches

import torch
from torch import Tensor, nn


def parse_dtype(name: str | torch.dtype, argument: str) -> torch.dtype:
    """Turn a config's dtype name such as ``'bfloat16'`` into a floating point dtype of torch.

    Raises:
        ValueError: There is no such dtype; the message names ``argument``.
    """
    dtype = name if isinstance(name, torch.dtype) else getattr(torch, str(name), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(
            f"{argument}={name!r} is not a floating point dtype of torch; use e.g. 'float32' or 'bfloat16'"
        )
    return dtype


def freeze(
    network: nn.Module,
    exclude: Sequence[str] = (),
    exclude_fp32: bool = True,
    exclude_autocast_dtype: str | torch.dtype | None = 'float32',
    keep_result: Sequence[str] = (),
) -> list[str]:
    """Freeze a network except for the parts that are named.

    A key of ``exclude`` selects every module whose qualified name contains it: ``'proj_out'`` also selects
    ``single_transformer_blocks.0.proj_out``. ``'self.proj_out'`` selects the module of exactly that name. A key that
    matches no module is tried on parameters in the same way.

    Args:
        network: The network, changed in place.
        exclude: What stays trainable.
        exclude_fp32: Whether trainable parts get float32 weights.
        exclude_autocast_dtype: Precision in which the float32 parts compute: ``'float32'``, or a lower one for
            autocast; None for whatever surrounds them.
        keep_result: Names of modules whose result is not cast back to the precision of their input (output layers).

    Returns:
        The names of the trainable parameters.

    Raises:
        ValueError: A key matches nothing.
    """
    network.requires_grad_(False)
    surrounding = next(network.parameters()).dtype
    modules = {name: module for name, module in network.named_modules() if name}
    parameters = dict(network.named_parameters())
    roots: list[str] = []  # outermost selected modules: a module computes in one precision, with all it contains
    for key in exclude:
        found = [name for name in modules if _selects(key, name)]
        loose = [] if found else [name for name in parameters if _selects(key, name)]
        if not found and not loose:
            raise ValueError(_nothing_matches(key, modules, parameters))
        for name in found:
            modules[name].requires_grad_(True)
        for name in loose:
            parameters[name].requires_grad_(True)
            if exclude_fp32:
                parameters[name].data = parameters[name].data.float()
        roots += [name for name in found if not any(name.startswith(other + '.') for other in found)]
    roots = sorted(set(roots))
    roots = [name for name in roots if not any(name.startswith(other + '.') for other in roots)]
    if exclude_fp32:
        for name in roots:
            modules[name].float()
            if exclude_autocast_dtype is not None:
                dtype = parse_dtype(exclude_autocast_dtype, 'freeze_exclude_autocast_dtype')
                keep = any(name == other or name.startswith(other + '.') for other in keep_result)
                for module in _callable_parts(modules[name]):
                    compute_in(module, dtype, None if keep else surrounding)
    return [name for name, parameter in network.named_parameters() if parameter.requires_grad]


def compute_in(module: nn.Module, dtype: torch.dtype, result_dtype: torch.dtype | None) -> None:
    """Make a module with float32 weights compute in ``dtype``, whatever precision surrounds it.

    Args:
        module: The module, changed in place.
        dtype: float32, or a lower precision for autocast inside the module.
        result_dtype: Dtype of its floating point results; None to leave them as they are.
    """
    # a partial, not a closure: deepcopy of the module then binds the copy
    module.forward = functools.partial(_forward_in, module, dtype, result_dtype)


def _forward_in(module: nn.Module, dtype: torch.dtype, result_dtype: torch.dtype | None, *args, **kwargs):
    kind = next((value.device.type for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), 'cpu')
    with autocast(kind, None if dtype == torch.float32 else dtype, override=True):
        if dtype == torch.float32:
            args = [_cast(value, torch.float32) for value in args]
            kwargs = {name: _cast(value, torch.float32) for name, value in kwargs.items()}
        result = type(module).forward(module, *args, **kwargs)
    if isinstance(result, tuple):
        return tuple(_cast(value, result_dtype) for value in result)
    return _cast(result, result_dtype)


def _cast(value, dtype: torch.dtype | None):
    return value.to(dtype) if dtype is not None and isinstance(value, Tensor) and value.is_floating_point() else value


def _callable_parts(module: nn.Module) -> list[nn.Module]:
    """The module, or the parts of a container that is never called itself."""
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return [part for child in module.children() for part in _callable_parts(child)]
    return [module]


def autocast(device_type: str, dtype: torch.dtype | None, override: bool = False):
    """Autocast to ``dtype`` on any kind of device.

    Args:
        device_type: Kind of device, such as ``'cpu'`` or ``'cuda'``.
        dtype: Lower precision; None switches autocast off if ``override`` is set, and changes nothing otherwise.
        override: See ``dtype``.
    """
    if device_type == 'meta' or (dtype is None and not override):
        return nullcontext()
    return torch.autocast(device_type, dtype=dtype, enabled=dtype is not None)


def _selects(key: str, name: str) -> bool:
    return name == key[len('self.') :] if key.startswith('self.') else key in name


def _nothing_matches(key: str, modules, parameters) -> str:
    names = sorted({part for name in (*modules, *parameters) for part in (name, name.rsplit('.', 1)[-1])})
    near = get_close_matches(key.removeprefix('self.'), names, n=3)
    hint = f'; near it: {", ".join(near)}' if near else ''
    return f'freeze_exclude names {key!r}, which is part of no module or parameter name of the network{hint}'
