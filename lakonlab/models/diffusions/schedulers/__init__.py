"""Flow solvers in the form of diffusers schedulers, imported when first used."""

from __future__ import annotations

import importlib

SCHEDULER_MODULES: dict[str, str] = {
    'FlowEulerODE': 'flow_euler_ode',
    'FlowHeunODE': 'flow_heun_ode',
    'FlowSDE': 'flow_sde',
    'FlowMapSDE': 'flow_map_sde',
    'FlowAdapter': 'flow_adapter',
}


def scheduler_class(name: str) -> type:
    """The scheduler that a config calls ``name``, for instance ``'FlowEulerODE'``.

    Raises:
        ValueError: There is no such scheduler.
    """
    if name not in SCHEDULER_MODULES:
        raise ValueError(f'test_cfg.sampler={name!r}: expected one of {", ".join(SCHEDULER_MODULES)}')
    return getattr(importlib.import_module(f'.{SCHEDULER_MODULES[name]}', __name__), f'{name}Scheduler')


def __getattr__(name: str) -> type:
    if name.removesuffix('Scheduler') in SCHEDULER_MODULES and name.endswith('Scheduler'):
        return scheduler_class(name.removesuffix('Scheduler'))
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
