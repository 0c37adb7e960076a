#!/usr/bin/env python
"""Make the reference statistics that FID, KID, precision and recall compare with; the file says what they depend on.

python tools/make_reference.py data/coco/val2017 coco.safetensors            of a folder of images
python tools/make_reference.py CONFIG digits.safetensors --data train --extractor DigitClassifier
python tools/make_reference.py samples.npz samples.safetensors               of images of ADM, or of its statistics
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description='Make reference statistics of images.')
    parser.add_argument(
        'source', metavar='SOURCE', help='folder of images, config (.py), .npz of images, or .npz/.pkl of statistics'
    )
    parser.add_argument('out', metavar='OUT', help='file to write, .safetensors')
    parser.add_argument('--data', metavar='SPLIT', help='data split of the config (default: val)')
    parser.add_argument(
        '--extractor', metavar='NAME', help='feature extractor, or its config in JSON (default: InceptionV3)'
    )
    parser.add_argument('--no-resize', action='store_true', help='give images to the extractor in their own size')
    parser.add_argument('--center-crop', action='store_true', help='cut out the middle instead of resizing')
    parser.add_argument('--resize-mode', choices=['bicubic', 'bilinear'], help='default: bicubic')
    parser.add_argument('--num-images', type=int, metavar='N', help='only the first N images')
    parser.add_argument('--batch-size', type=int, default=64, metavar='N')
    parser.add_argument('--no-features', action='store_true', help='keep only the moments, which FID needs')
    parser.add_argument('--device', help='where to compute (default: the GPU, if there is one)')
    return parser.parse_args()


def main() -> int:
    """Read the command line first: what follows takes seconds to import."""
    args = parse_args()
    from lakonlab.runner.launch import run_command
    from lakonlab.runner.make_reference import make

    return run_command(make, args)


if __name__ == '__main__':
    sys.exit(main())
