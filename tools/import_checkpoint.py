#!/usr/bin/env python
"""Import a training checkpoint in the published layout, so that a run can go on from it.

python tools/import_checkpoint.py iter_3000.pth checkpoints/imported --config CONFIG
python tools/train.py CONFIG --resume-from checkpoints/imported/iter_3000
"""

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description='Write a published training checkpoint as a directory to resume from.')
    parser.add_argument('checkpoint', metavar='PTH', help='the published file; objects in it are never unpickled')
    parser.add_argument('out', metavar='OUT', help='directory that gets iter_<N>')
    parser.add_argument('--config', help='config of the run that goes on; every tensor is compared with its model')
    parser.add_argument(
        '--cfg-options', nargs='+', metavar='KEY=VALUE', help='change the config, as in the run that goes on'
    )
    parser.add_argument('--no-optimizer', action='store_true', help='leave out what the optimizers remember')
    return parser.parse_args()


def main() -> int:
    """Read the command line first: what follows takes seconds to import."""
    args = parse_args()
    from lakonlab.runner.import_published import import_checkpoint
    from lakonlab.runner.launch import run_command

    logging.basicConfig(format='%(levelname)s - %(message)s')
    logging.getLogger('lakonlab').setLevel('INFO')
    return run_command(import_checkpoint, args)


if __name__ == '__main__':
    sys.exit(main())
