#!/usr/bin/env python
"""Embed the negative prompt of a config, whose file its data sets name as ``negative_prompt_embeds_path``.

python tools/cache_negative_prompt.py configs/piqwen/gmqwen_k8_piid_4step_32gpus.py \
    --text-encoder configs/piqwen/_text_encoder.py
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lakonlab.runner.arguments import add_launch_arguments
from lakonlab.runner.cache_arguments import add_config_arguments, add_precision_argument


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description='Embed negative prompts. No file that is there is overwritten.')
    add_config_arguments(parser)
    parser.add_argument(
        '--out', metavar='FILE', help='.safetensors or .pth (default: negative_prompt_embeds_path of the data sets)'
    )
    parser.add_argument('--prompt', help='text (default: that of negative_prompt_kwargs, or the empty one)')
    add_precision_argument(parser, 'bf16')
    add_launch_arguments(parser, default=None)
    return parser.parse_args()


def main() -> int:
    """Read the command line first: what follows takes seconds to import."""
    args = parse_args()
    from lakonlab.runner.cache_negative_prompt import cache_negative_prompt
    from lakonlab.runner.launch import run_command

    return run_command(cache_negative_prompt, args)


if __name__ == '__main__':
    sys.exit(main())
