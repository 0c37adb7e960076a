#!/usr/bin/env python
"""Print how many parameters the networks of a checkpoint or a file of weights have.

python tools/count_parameters.py checkpoints/NAME/latest
"""

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description='Print how many parameters the networks of a checkpoint or a file of weights have.'
    )
    parser.add_argument('path', help='checkpoint, published .pth or .safetensors')
    parser.add_argument('--ema-only', action='store_true', help='count the average only')
    return parser.parse_args()


def main() -> int:
    """Read the command line first: what follows takes seconds to import."""
    args = parse_args()
    from lakonlab.runner.checkpoint_tools import count_parameters
    from lakonlab.runner.launch import run_command

    logging.basicConfig(format='%(levelname)s - %(message)s')
    return run_command(count_parameters, args)


if __name__ == '__main__':
    sys.exit(main())
