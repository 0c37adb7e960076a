#!/usr/bin/env python
"""Write a LoRA of FLUX of ComfyUI, kohya or XLabs in the layout of diffusers.

python tools/convert_comfy_flux_lora_to_diffusers.py IN.safetensors OUT.safetensors
"""

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description='Write a LoRA of FLUX of ComfyUI, kohya or XLabs in the layout of diffusers.'
    )
    parser.add_argument('source', metavar='IN', help='the file to read')
    parser.add_argument('target', metavar='OUT', help='the file to write')
    return parser.parse_args()


def main() -> int:
    """Read the command line first: what follows takes seconds to import."""
    args = parse_args()
    from lakonlab.runner.convert_lora import convert_flux_lora
    from lakonlab.runner.launch import run_command

    logging.basicConfig(format='%(levelname)s - %(message)s')
    return run_command(convert_flux_lora, args)


if __name__ == '__main__':
    sys.exit(main())
