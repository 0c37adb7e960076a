"""Which parameters of a network train, and in which precision the trainable ones compute."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
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
    keeps_result: Callable[[str], bool] = lambda name: False,
    name_of: Callable[[str], str | None] = lambda name: name,
) -> list[str]:
    """Freeze a network except for the parts that are named.

    A key of ``exclude`` selects every module whose qualified name contains it: ``'proj_out'`` also selects
    ``single_transformer_blocks.0.proj_out``. ``'self.proj_out'`` selects the module of exactly that name. A key that
    matches no module is tried on parameters in the same way.

    Args:
        network: The network, changed in place.
        exclude: What stays trainable.
        exclude_fp32: Whether trainable parts get float32 weights, and layers of which single parameters train.
        exclude_autocast_dtype: Precision in which the float32 parts compute: ``'float32'``, or a lower one for
            autocast; None for whatever surrounds them.
        keeps_result: Says of the name of a module whether its result is not cast back to the precision of its input,
            as of output layers.
        name_of: Qualified name -> the name that the keys are compared with; None for what is not to be selected.

    Returns:
        The qualified names of the trainable parameters.

    Raises:
        ValueError: A key matches nothing.
    """
    surrounding = next(network.parameters()).dtype

    def raise_precision(path: str) -> None:
        module = network.get_submodule(path).float()
        if exclude_autocast_dtype is None:
            return
        dtype = parse_dtype(exclude_autocast_dtype, 'freeze_exclude_autocast_dtype')
        result_dtype = None if keeps_result(name_of(path)) else surrounding
        for part in _callable_parts(module):
            compute_in(part, dtype, result_dtype)

    network.requires_grad_(False)
    roots, loose = select(network, exclude, name_of)
    for name in roots:
        module = network.get_submodule(name)
        module.requires_grad_(True)
        if exclude_fp32:
            raise_precision(name)
    owners = set()
    for name in loose:
        parameter = network.get_parameter(name).requires_grad_(True)
        owner = name.rpartition('.')[0]
        if exclude_fp32 and any(True for _ in network.get_submodule(owner).children()):
            parameter.data = parameter.data.float()
        elif exclude_fp32:
            owners.add(owner)
    for owner in sorted(owners):  # a layer computes in one precision, whichever of its parameters train
        raise_precision(owner)
    return [name for name, parameter in network.named_parameters() if parameter.requires_grad]


def select(
    network: nn.Module, keys: Sequence[str], name_of: Callable[[str], str | None] = lambda name: name
) -> tuple[list[str], list[str]]:
    """Find what keys select, see :func:`freeze`.

    Returns:
        Qualified names of the outermost selected modules, and of parameters that were selected one by one.

    Raises:
        ValueError: A key matches nothing.
    """
    modules = {name: seen for name, _ in network.named_modules() if name and (seen := name_of(name))}
    parameters = {name: seen for name, _ in network.named_parameters() if (seen := name_of(name))}
    roots: set[str] = set()
    loose: set[str] = set()
    for key in keys:
        found = {name for name, seen in modules.items() if _selects(key, seen)}
        single = set() if found else {name for name, seen in parameters.items() if _selects(key, seen)}
        if not found and not single:
            raise ValueError(_nothing_matches(key, modules.values(), parameters.values()))
        roots |= found
        loose |= single
    # a module computes in one precision, with all it contains
    outermost = [name for name in roots if not any(parent in roots for parent in _parents(name))]
    return sorted(outermost), sorted(name for name in loose if not any(parent in roots for parent in _parents(name)))


def _parents(name: str) -> list[str]:
    """The qualified names of all modules that contain one."""
    parts = name.split('.')
    return ['.'.join(parts[:count]) for count in range(1, len(parts))]


def computing_dtype(module: nn.Module) -> torch.dtype | None:
    """The precision that :func:`compute_in` gave a module; None for what surrounds it."""
    overridden = vars(module).get('forward')
    return overridden.args[1] if isinstance(overridden, functools.partial) and overridden.func is _forward_in else None


def compute_like(module: nn.Module, example: nn.Module) -> None:
    """Make a module compute in the precision that :func:`compute_in` gave another one, if it did."""
    overridden = vars(example).get('forward')
    if overridden is not None:
        compute_in(module, *overridden.args[1:])


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
