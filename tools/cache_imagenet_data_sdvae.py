#!/usr/bin/env python
"""Encode labelled images into latents, once, so that training needs neither images nor the autoencoder.

python tools/cache_imagenet_data_sdvae.py --data-root data/imagenet/train --out-data-root data/imagenet/train_cache
torchrun --nproc_per_node=8 tools/cache_imagenet_data_sdvae.py                   the same by eight processes
python tools/cache_imagenet_data_sdvae.py --check                                names what is damaged
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lakonlab.runner.arguments import add_launch_arguments
from lakonlab.runner.cache_arguments import add_format_arguments


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description='Encode labelled images into latents. What was interrupted is gone on with; nothing that is there '
        'is overwritten.'
    )
    parser.add_argument('--data-root', default='data/imagenet/train', help='folder of the images')
    parser.add_argument('--datalist-path', default='data/imagenet/train.txt', help='lines `relative/path label`')
    parser.add_argument('--out-data-root', default='data/imagenet/train_cache', help='folder of the cache')
    parser.add_argument(
        '--out-datalist-path', default='data/imagenet/train_cache.txt', help='list of --format published, written last'
    )
    parser.add_argument('--image-size', type=int, default=256, help='side of the square in pixels (default: 256)')
    parser.add_argument('--batch-size', type=int, default=32, help='images encoded at once (default: 32)')
    parser.add_argument(
        '--dtype', choices=['float32', 'bfloat16', 'float16'], default='float32', help='of autoencoder and latents'
    )
    parser.add_argument('--vae', default='stabilityai/sd-vae-ft-ema', help='folder or repository of the autoencoder')
    parser.add_argument(
        '--flip',
        choices=['both', 'none', 'random'],
        help='both: latents of the image and of its mirror image; random: of one of them (default: both, in the '
        'published layout random)',
    )
    parser.add_argument('--posterior', choices=['sample', 'argmax'], default='sample', help='a sample, or the mode')
    add_format_arguments(parser, 4096)
    add_launch_arguments(parser, default=None)
    return parser.parse_args()


def main() -> int:
    """Read the command line first: what follows takes seconds to import."""
    args = parse_args()
    from lakonlab.runner.cache_latents import cache_latents
    from lakonlab.runner.launch import run_command

    return run_command(cache_latents, args)


if __name__ == '__main__':
    sys.exit(main())
