"""Scripts that serve a page, started as a user starts them."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gradio_client import Client

DEMO = Path(__file__).parents[2] / 'demo'
LONGEST = 300
"""Seconds until a script that should end counts as hanging."""


def free_port() -> int:
    """A port that nothing listens at."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def served(script: str, folder: Path, *options: Any, ended_by: signal.Signals) -> Iterator[Client]:
    """Start a script of ``demo/`` at a port; a client of its page. Afterwards a signal must end it without a complaint.

    Args:
        script: Name of the file.
        folder: Directory to work in; what the page keeps and what is fetched from it is there too.
        *options: Of the script, but ``--port``.
        ended_by: The signal.
    """
    port = free_port()
    command = [sys.executable, DEMO / script, *options, '--port', port]
    environment = {**os.environ, 'GRADIO_TEMP_DIR': str(folder / 'page'), 'PYTHONUNBUFFERED': '1'}
    with (
        (folder / 'errors.txt').open('w+') as errors,
        subprocess.Popen(
            [str(word) for word in command],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as process,
    ):
        try:
            address = f'http://127.0.0.1:{port}'
            if not any(address in line for line in process.stdout):  # ends with the process
                raise AssertionError(Path(errors.name).read_text())
            with contextlib.closing(Client(address, download_files=folder / 'fetched', verbose=False)) as client:
                yield client
            process.send_signal(ended_by)
            output, _ = process.communicate(timeout=LONGEST)
            assert process.returncode == 0, output
            assert 'Traceback' not in Path(errors.name).read_text()
        finally:
            process.kill()
    with socket.socket() as again:
        again.bind(('127.0.0.1', port))
