"""The parts of mmengine that run in our loop, imported without the packages that mmengine looks for.

On import, mmengine registers the optimisers of transformers, bitsandbytes and others wherever these are installed. That
costs five seconds and loads peft, for names that our optimisers (``lakonlab/runner/optimizer.py``) do not go through.
Import hooks and logging from here rather than from mmengine.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

PROBED_PACKAGES = ('transformers', 'bitsandbytes', 'dadaptation', 'lion_pytorch', 'Sophia')


@contextlib.contextmanager
def _as_if_not_installed(packages: tuple[str, ...]) -> Iterator[None]:
    hidden = [name for name in packages if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # None there makes Python raise ImportError
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


with _as_if_not_installed(PROBED_PACKAGES):
    from mmengine.hooks import Hook, IterTimerHook, LoggerHook, RuntimeInfoHook
    from mmengine.logging import HistoryBuffer, MessageHub
    from mmengine.registry import VISBACKENDS
    from mmengine.runner import LogProcessor
    from mmengine.runner.priority import get_priority
    from mmengine.visualization import Visualizer, WandbVisBackend

__all__ = [
    'VISBACKENDS',
    'HistoryBuffer',
    'Hook',
    'IterTimerHook',
    'LogProcessor',
    'LoggerHook',
    'MessageHub',
    'RuntimeInfoHook',
    'Visualizer',
    'WandbVisBackend',
    'get_priority',
]
