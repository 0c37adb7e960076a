"""Key-value stores of a run, apart from the one that its process group uses."""

from __future__ import annotations

import os
import socket
from datetime import timedelta

import torch.distributed as dist

from lakonlab.ranks import Ranks

CONNECTION_LIMIT = timedelta(seconds=60)


def serve_store(ranks: Ranks) -> tuple[dist.Store | None, tuple[str, int]]:
    """Open a store in the main process; to be called by all processes together.

    The store of the default group would not do: whoever waits in it keeps its connection busy.

    Args:
        ranks: The processes.

    Returns:
        The store in the main process, to be kept as long as it is used, None in the others; and its host and port.

    Raises:
        RuntimeError: It cannot be opened, in all processes.
    """
    opened: list[dist.Store] = []

    def serve() -> tuple[str, int]:
        host = os.environ.get('MASTER_ADDR') or socket.gethostname()
        if ranks.local_world_size == ranks.world_size:
            host = '127.0.0.1'
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=CONNECTION_LIMIT)
        opened.append(store)
        return host, store.port

    address = ranks.on_main(serve)
    return next(iter(opened), None), address
