"""The strategy that a config asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lakonlab.parallel.strategy import Strategy
from lakonlab.ranks import Ranks
from lakonlab.registry import STRATEGIES
from lakonlab.runner.sections import saves_trainable_only


def build_strategy(cfg: Mapping[str, Any], ranks: Ranks, device: str | torch.device | None) -> Strategy:
    """How the processes of a run share it.

    Args:
        cfg: The checked config; ``module_wrapper`` names the strategy, None means ``ddp``.
        ranks: The processes; one that no launcher started trains alone, whatever ``module_wrapper`` says.
        device: Device of this process.
    """
    options = {'ranks': ranks, 'device': device, 'trainable_only': saves_trainable_only(cfg)}
    if ranks.group is None:
        return STRATEGIES.build({'type': 'single', **options})
    name = cfg.get('module_wrapper') or 'ddp'
    options['find_unused_parameters'] = bool(cfg.get('find_unused_parameters', False))
    if name != 'ddp':
        options.update(cfg.get('fsdp_kwargs') or {})
    return STRATEGIES.build({'type': name, **options})
