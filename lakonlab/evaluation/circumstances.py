"""When and with what results are made."""

from __future__ import annotations

import platform
import time
from typing import Any

import torch


def circumstances() -> dict[str, Any]:
    """Facts to be kept with results that have just been made, as plain data."""
    return dict(
        finished=time.strftime('%Y-%m-%dT%H:%M:%S%z'),
        torch=torch.__version__,
        python=platform.python_version(),
        num_threads=torch.get_num_threads(),
    )
