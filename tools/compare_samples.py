#!/usr/bin/env python
"""Show the samples of several evaluations side by side, on one page.

python tools/compare_samples.py viz/a/val/iter_1000.html viz/b/val/iter_1000.html --out viz/a_and_b.html
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description='Show samples of the same prompts and noise side by side.')
    parser.add_argument('pages', nargs='+', metavar='PAGE', help='pages (.html) that evaluations have written')
    parser.add_argument('--out', required=True, metavar='FILE', help='the page to write')
    parser.add_argument('--names', nargs='+', metavar='NAME', help='what each run is called (default: its title)')
    parser.add_argument('--embed', action='store_true', help='put the images into the page')
    parser.add_argument('--any-noise', action='store_true', help='also samples that did not start from the same noise')
    return parser.parse_args()


def main() -> int:
    """Read the command line first: what follows takes seconds to import."""
    args = parse_args()
    from lakonlab.runner.compare_samples import compare_samples
    from lakonlab.runner.launch import run_command

    return run_command(compare_samples, args)


if __name__ == '__main__':
    sys.exit(main())
