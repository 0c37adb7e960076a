"""Whether all processes of a run do the same."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from mmengine.config import Config

from lakonlab.config.load import resolved_text
from lakonlab.ranks import Ranks
from lakonlab.runner.resume import config_values

MOST_LINES = 8


class DisagreementError(RuntimeError):
    """Processes of one run have different configs, or have drifted apart."""


def require_agreement(ranks: Ranks, facts: Mapping[str, object], when: str) -> None:
    """Compare facts of all processes.

    Args:
        ranks: The processes.
        facts: Name -> plain value.
        when: What the run is doing, for the message.

    Raises:
        DisagreementError: In all processes, if any two differ.
    """
    everyone = ranks.all_gather({name: str(value) for name, value in facts.items()})
    lines = []
    for name in sorted({name for own in everyone for name in own}):
        by_value: dict[str, list[int]] = {}
        for rank, own in enumerate(everyone):
            by_value.setdefault(own.get(name, '(absent)'), []).append(rank)
        if len(by_value) > 1:
            lines.append(f'{name} is ' + ', '.join(f'{value} on {_ranks(who)}' for value, who in by_value.items()))
    if lines:
        more = f'; and {len(lines) - MOST_LINES} more' if len(lines) > MOST_LINES else ''
        raise ranks.common(
            DisagreementError(
                f'the processes of this run differ {when}: {"; ".join(lines[:MOST_LINES])}{more}. Start all of them '
                'with the same config, options, code and versions.'
            )
        )


def require_same_config(ranks: Ranks, cfg: Config, seed: int) -> None:
    """Compare what the processes were started with, before they build anything that would wait for the others.

    Args:
        ranks: The processes.
        cfg: The config.
        seed: Seed of the run.

    Raises:
        DisagreementError: In all processes, if any two differ.
    """
    if ranks.world_size == 1:
        return
    try:
        values = config_values(resolved_text(cfg))
    except SyntaxError:  # values without a literal are compared as a whole, later
        values = {}
    require_agreement(ranks, {**values, 'seed': seed, 'torch': torch.__version__}, 'at launch')


def _ranks(ranks: list[int], most: int = 8) -> str:
    shown = ', '.join(map(str, ranks[:most])) + (', ...' if len(ranks) > most else '')
    return f'rank {shown}'
