#!/usr/bin/env python
"""Train what a config describes, or continue where a run of it was interrupted.

python tools/train.py configs/digits/dit_digits_teacher.py            about two minutes on two CPU cores
python tools/train.py CONFIG --dry-run                                what it would do, in seconds
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lakonlab.runner.arguments import add_common_arguments


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description='Train what a config describes; an interrupted run is continued.')
    add_common_arguments(parser)
    parser.add_argument(
        '--resume-from', help='checkpoint to resume from; it must exist (default: the newest of the run)'
    )
    parser.add_argument('--no-validate', action='store_true', help='do not evaluate while training')
    parser.add_argument('--dry-run', action='store_true', help='say what would be done, plan memory, and exit')
    parser.add_argument(
        '--plan-world-size', default='1,8', metavar='N,N', help='numbers of processes that --dry-run plans memory for'
    )
    return parser.parse_args()


def main() -> int:
    """Read the command line first: what follows takes seconds to import."""
    args = parse_args()
    from lakonlab.runner.launch import run_command, train

    return run_command(train, args)


if __name__ == '__main__':
    sys.exit(main())
