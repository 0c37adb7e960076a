#!/usr/bin/env python
"""Evaluate a checkpoint with the evaluations of its config; the numbers go to <work_dir>/results.json and results.md.

python tools/test.py configs/digits/dit_digits_teacher.py             the newest checkpoint of the run
python tools/test.py CONFIG --ckpt checkpoints/NAME/iter_1000 --data val
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lakonlab.runner.arguments import add_common_arguments


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description='Evaluate a checkpoint and write results.json.')
    add_common_arguments(parser)
    parser.add_argument('--ckpt', help='checkpoint; it must exist (default: the newest of the run)')
    parser.add_argument('--data', nargs='+', metavar='SPLIT', help='only evaluations of these data splits')
    parser.add_argument('--skip-existing', action='store_true', help='keep finished results of the same checkpoint')
    parser.add_argument(
        '--reuse-viz', action='store_true', help='measure images of the same weights that are in viz_dir already'
    )
    parser.add_argument('--timer', action='store_true', help='measure sampling speed in every evaluation')
    parser.add_argument('--dry-run', action='store_true', help='say what would be evaluated, and exit')
    return parser.parse_args()


def main() -> int:
    """Read the command line first: what follows takes seconds to import."""
    args = parse_args()
    from lakonlab.runner.launch import run_command, test

    return run_command(test, args)


if __name__ == '__main__':
    sys.exit(main())
