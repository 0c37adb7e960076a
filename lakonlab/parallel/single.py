"""One process, one device."""

from __future__ import annotations

from lakonlab.parallel.strategy import Strategy
from lakonlab.registry import STRATEGIES


@STRATEGIES.register_module('single')
class SingleProcess(Strategy):
    """Training in one process. See :class:`Strategy` for the arguments."""
