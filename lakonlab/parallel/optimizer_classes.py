"""Which class the name of an optimiser means, where parameters are whole and where they are divided."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

EIGHT_BITS = '8bit'
BITSANDBYTES_SUFFIXES = (EIGHT_BITS, '32bit')
BY_SHAPE = ('Adafactor', 'Muon')
"""Optimisers of torch whose step depends on the shape of a parameter."""
NEVER = {
    'LBFGS': 'computes the loss several times in a step, a training step computes it once',
    'SparseAdam': 'takes sparse gradients only, and those of models here are dense',
}
"""Optimisers of torch that no training step here can use, and why."""

NOT_BY_ROWS = ('Rprop',)
"""Optimisers of torch that treat every number by itself, but with operations that its tensors divided by rows lack."""
FUSED_BY_ROWS = ('Adam', 'AdamW')
"""Optimisers of torch that update tensors divided by rows in one kernel."""

OptimizerClasses = Callable[[str], type[Optimizer]]


def named_class(key: str, name: str, classes: OptimizerClasses) -> type[Optimizer]:
    """Look up an optimiser for a section of the config.

    Args:
        key: Key of the section, for errors.
        name: Its ``type``.
        classes: Name -> class.

    Raises:
        ValueError: There is no such optimiser, or it cannot run here.
        ImportError: A package is missing.
    """
    try:
        return classes(name)
    except (ValueError, ImportError) as error:
        raise type(error)(f'optimizer[{key!r}].type: {error}') from error


def optimizer_of_whole(name: str) -> type[Optimizer]:
    """The optimiser of whole parameters: torch's own, or bitsandbytes' for names ending in ``8bit`` or ``32bit``.

    Raises:
        ValueError: There is no such optimiser, or no training step can use it.
        ImportError: It is one of bitsandbytes', which is not installed.
    """
    if name in NEVER:
        raise ValueError(f"{name!r} {NEVER[name]}; expected another optimiser of torch, such as 'AdamW'")
    found = getattr(torch.optim, name, None)
    if inspect.isclass(found) and issubclass(found, Optimizer) and found is not Optimizer:
        return found
    if name.endswith(BITSANDBYTES_SUFFIXES):
        try:
            import bitsandbytes.optim as optim
        except ImportError as error:
            raise ImportError(f'{name!r} needs bitsandbytes: pip install bitsandbytes.{_plain(name)}') from error
        if hasattr(optim, name):
            return getattr(optim, name)
    raise ValueError(f'{name!r} is unknown; torch.optim has {", ".join(_names_of_torch())}')


def optimizer_of_flat(name: str, strategy: str) -> type[Optimizer]:
    """The optimiser of parameters that are divided without regard to their shape.

    Args:
        name: Name of the optimiser, one of torch's that treats every number by itself.
        strategy: Name of the strategy that divides them, for errors.

    Raises:
        ValueError: There is no such optimiser, or it needs whole parameters.
    """
    if name.endswith(BITSANDBYTES_SUFFIXES):
        other = ", or to 'fsdp2', where torchao has it" if _torchao_has(name) and strategy != 'fsdp2' else ''
        raise ValueError(
            f'{name!r} is one of bitsandbytes, which needs whole parameters, and module_wrapper={strategy!r} divides '
            f"them; set module_wrapper to 'ddp'{other}; or expected one of torch that treats every number by itself, "
            f'such as {_plain_name(name) or "AdamW"!r}'
        )
    if name in BY_SHAPE:
        raise ValueError(
            f'{name!r} looks at whole parameters, and module_wrapper={strategy!r} divides them; expected an optimiser '
            "that treats every number by itself, such as 'AdamW'; or set module_wrapper to 'ddp'"
        )
    return optimizer_of_whole(name)


def optimizer_of_rows(name: str, strategy: str) -> type[Optimizer]:
    """The optimiser of parameters that are divided by rows: torch's, or torchao's for ``Adam8bit`` and ``AdamW8bit``.

    Args:
        name: Name of the optimiser.
        strategy: Name of the strategy that divides them, for errors.

    Raises:
        ValueError: There is no such optimiser, or it needs whole parameters.
        ImportError: It is one of torchao's, which is not installed.
    """
    if name in NOT_BY_ROWS:
        raise ValueError(
            f"torch's {name!r} cannot update parameters that module_wrapper={strategy!r} divides by rows; expected "
            "another optimiser, such as 'AdamW'; or set module_wrapper to 'fsdp' or 'ddp'"
        )
    if not _torchao_has(name):
        return optimizer_of_flat(name, strategy)
    from lakonlab.parallel.block_moments import block_optimizer

    try:
        return block_optimizer(name)
    except ImportError as error:
        raise ImportError(
            f'{name!r} with module_wrapper={strategy!r} needs torchao: pip install torchao.{_plain(name)}'
        ) from error


def can_fuse(kind: type[Optimizer], parameters: Iterable[Tensor]) -> bool:
    """Whether torch can update parameters, divided or not, in one kernel, if it can update whole ones so."""
    return kind.__name__ in FUSED_BY_ROWS or not any(hasattr(parameter, 'to_local') for parameter in parameters)


def _torchao_has(name: str) -> bool:
    return name in ('Adam8bit', 'AdamW8bit')


def _plain_name(name: str) -> str | None:
    """torch's optimiser of full precision with the same rule."""
    plain = name.removeprefix('Paged')
    for suffix in BITSANDBYTES_SUFFIXES:
        plain = plain.removesuffix(suffix)
    return plain if plain in _names_of_torch() else None


def _plain(name: str) -> str:
    plain = _plain_name(name)
    return f' Without it, use {plain!r}.' if plain else ''


def _names_of_torch() -> list[str]:
    return sorted(
        key
        for key, value in vars(torch.optim).items()
        if inspect.isclass(value) and issubclass(value, Optimizer) and value is not Optimizer and key not in NEVER
    )
