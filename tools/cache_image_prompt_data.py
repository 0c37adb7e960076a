#!/usr/bin/env python
"""Embed the prompts of a config's data sets, once, so that training needs no text encoder.

python tools/cache_image_prompt_data.py configs/piqwen/gmqwen_k8_piid_4step_32gpus.py \
    --text-encoder configs/piqwen/_text_encoder.py
torchrun --nproc_per_node=8 tools/cache_image_prompt_data.py CONFIG --text-encoder CONFIG --launcher pytorch
python tools/cache_image_prompt_data.py CONFIG --check                 names what is damaged
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lakonlab.datasets.precisions import PRECISIONS
from lakonlab.runner.arguments import add_launch_arguments
from lakonlab.runner.cache_arguments import add_config_arguments, add_format_arguments, add_precision_argument


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description='Embed the prompts of a config, and encode the images that belong to them. What was interrupted is '
        'gone on with; nothing that is there is overwritten.'
    )
    add_config_arguments(parser)
    parser.add_argument('--data', nargs='+', metavar='SPLIT', help='data sets (default: train, val*, test*)')
    parser.add_argument('--max-size', type=int, metavar='N', help='only the last N prompts')
    parser.add_argument('--batch-size', type=int, default=4, help='prompts embedded at once (default: 4)')
    parser.add_argument('--skip-existing', action='store_true', help='accepted; records that are whole are always kept')
    parser.add_argument('--latents-precision', choices=PRECISIONS, default='fp8', help='of latents (default: fp8)')
    add_precision_argument(parser, 'fp8')
    add_format_arguments(parser, 256)
    add_launch_arguments(parser, default=None)
    return parser.parse_args()


def main() -> int:
    """Read the command line first: what follows takes seconds to import."""
    args = parse_args()
    from lakonlab.runner.cache_prompts import cache_prompts
    from lakonlab.runner.launch import run_command

    return run_command(cache_prompts, args)


if __name__ == '__main__':
    sys.exit(main())
