"""Seconds and peak memory of building every published config at full size, without memory for its weights.

Each config is built in a process of its own, imports included, on the meta device: student, teacher and average.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ('piflow_imagenet', 'piqwen', 'piflux', 'misc', 'gmflow')


def measure(path: str) -> None:
    """Build a config and print what that took as a line of JSON."""
    begin = time.perf_counter()
    sys.path.insert(0, str(ROOT))
    from lakonlab.config.load import load_config
    from lakonlab.runner.dry_run import build_on_meta

    model = build_on_meta(load_config(path), locate=False)
    tensors = {id(tensor): tensor.numel() for tensor in [*model.parameters(), *model.buffers()]}
    seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps([seconds, peak, sum(tensors.values())]))


def main() -> None:
    """Measure all configs, or the one that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--one', metavar='CONFIG', help='measure this config in this process')
    options = parser.parse_args()
    if options.one is not None:
        measure(options.one)
        return
    paths = [path for folder in FOLDERS for path in sorted((ROOT / 'configs' / folder).glob('[!_]*.py'))]
    print(f'{"config":<58}{"seconds":>9}{"peak, GB":>10}{"parameters":>17}', flush=True)
    for path in paths:
        command = [sys.executable, __file__, '--one', str(path)]
        finished = subprocess.run(command, check=True, capture_output=True, text=True)
        seconds, peak, number = json.loads(finished.stdout.splitlines()[-1])
        name = f'{path.parent.name}/{path.stem}'
        print(f'{name:<58}{seconds:>9.1f}{peak / 2**30:>10.2f}{number:>17,}', flush=True)


if __name__ == '__main__':
    main()
