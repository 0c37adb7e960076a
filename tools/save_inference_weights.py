#!/usr/bin/env python
"""Write the networks of a checkpoint, without the state of the run, as one safetensors file.

python tools/save_inference_weights.py checkpoints/NAME/latest --ema-only
"""

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description='Write the networks of a checkpoint, without the state of the run, as one safetensors file.'
    )
    parser.add_argument('path', help='checkpoint, or a published .pth')
    parser.add_argument('--out-path', help='file to write; by default <checkpoint>_inference.safetensors beside it')
    parser.add_argument('--dtype', choices=('float32', 'float16', 'bfloat16'), default='float16', help='of the weights')
    parser.add_argument('--ema-only', action='store_true', help='leave out the student, of which it is the average')
    return parser.parse_args()


def main() -> int:
    """Read the command line first: what follows takes seconds to import."""
    args = parse_args()
    from lakonlab.runner.checkpoint_tools import save_inference_weights
    from lakonlab.runner.launch import run_command

    logging.basicConfig(format='%(levelname)s - %(message)s')
    return run_command(save_inference_weights, args)


if __name__ == '__main__':
    sys.exit(main())
