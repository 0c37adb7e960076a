#!/usr/bin/env python
"""Export a trained student for the pipelines of lakonlab.pipelines, for the hub, and for other programs.

python tools/export_piflow_to_diffusers.py CONFIG --ckpt checkpoints/NAME/latest --out-dir exports/NAME
"""

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description='Write a student: config, safetensors, scheduler, model card.')
    parser.add_argument('config', help='config of the run')
    parser.add_argument('--ckpt', help='checkpoint, or a published .pth; by default the newest of the run')
    parser.add_argument('--out-dir', help='folder to write; by default checkpoints/<name>/diffusers')
    parser.add_argument('--non-ema', action='store_true', help='export the student itself, not its moving average')
    parser.add_argument(
        '--dtype', choices=('float32', 'float16', 'bfloat16'), help='of the weights; by default as in the checkpoint'
    )
    parser.add_argument('--license', default='other', help='for the model card, an identifier of the hub')
    parser.add_argument('--cfg-options', nargs='+', metavar='KEY=VALUE', help='change the config, as in the run')
    return parser.parse_args()


def main() -> int:
    """Read the command line first: what follows takes seconds to import."""
    args = parse_args()
    from lakonlab.runner.export_adapter import export_command
    from lakonlab.runner.launch import run_command

    logging.basicConfig(format='%(levelname)s - %(message)s')
    logging.getLogger('lakonlab').setLevel('INFO')
    return run_command(export_command, args)


if __name__ == '__main__':
    sys.exit(main())
