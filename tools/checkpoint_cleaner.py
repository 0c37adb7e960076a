#!/usr/bin/env python
"""Remove the checkpoints of a run, but never the newest and the best; asks before it does.

python tools/checkpoint_cleaner.py checkpoints/NAME --dry-run
"""

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description='Remove the checkpoints of a run, but never the newest and the best; asks before it does.'
    )
    parser.add_argument('path', help='directory of the run')
    parser.add_argument('--dry-run', action='store_true', help='only say what would be removed')
    parser.add_argument('--yes', action='store_true', help='do not ask')
    parser.add_argument('--save-inf', action='store_true', help='keep the weights for inference of each')
    parser.add_argument('--dtype', choices=('float32', 'float16', 'bfloat16'), default='float16', help='of the weights')
    return parser.parse_args()


def main() -> int:
    """Read the command line first: what follows takes seconds to import."""
    args = parse_args()
    from lakonlab.runner.checkpoint_tools import clean_checkpoints
    from lakonlab.runner.launch import run_command

    logging.basicConfig(format='%(levelname)s - %(message)s')
    return run_command(clean_checkpoints, args)


if __name__ == '__main__':
    sys.exit(main())
