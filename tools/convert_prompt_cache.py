#!/usr/bin/env python
"""Convert a cache of prompts from the published layout, a pickled file per prompt, into shards that cannot hold code.

python tools/convert_prompt_cache.py data/text_to_image/preproc_qwen data/text_to_image/shards_qwen
python tools/convert_prompt_cache.py data/text_to_image/preproc_qwen data/text_to_image/shards_qwen --check
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description='Convert a published cache of prompts; nothing in it is run. What was interrupted is gone on with.'
    )
    parser.add_argument('source', metavar='SOURCE', help='folder of .zst files')
    parser.add_argument('out', metavar='OUT', help='folder of the new cache')
    parser.add_argument('--datalist', metavar='FILE', help='records to convert, in order (default: all of the folder)')
    parser.add_argument('--shard-size', type=int, default=256, metavar='N', help='records of a shard (default: 256)')
    parser.add_argument('--check', action='store_true', help='compare OUT with SOURCE, record by record')
    return parser.parse_args()


def main() -> int:
    """Read the command line first: what follows takes seconds to import."""
    args = parse_args()
    from lakonlab.runner.convert_cache import convert_cache
    from lakonlab.runner.launch import run_command

    return run_command(convert_cache, args)


if __name__ == '__main__':
    sys.exit(main())
