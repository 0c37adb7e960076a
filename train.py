#!/usr/bin/env python
"""Train what a config describes: ``tools/train.py`` on the GPUs one names, in one process for each of them.

python train.py CONFIG                        in this process, on the first GPU if there is one
python train.py CONFIG --gpu-ids 0 1          in two processes, each with its GPU
python train.py CONFIG --processes 2          the same on the first two GPUs, or on CPUs if there are no GPUs
"""

import sys
from pathlib import Path

from lakonlab.parallel.start_workers import run_tool

if __name__ == '__main__':
    sys.exit(run_tool(Path(__file__).resolve().parent / 'tools' / 'train.py'))
