#!/usr/bin/env python
"""Qwen-Image in 4 network evaluations, with a DX policy.

python demo/example_dxqwen_pipeline.py --benchmark
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lakonlab.ui.generate_example import run_example
from lakonlab.ui.pipeline_options import DXQWEN

PROMPT = 'A lighthouse keeper reads a letter by the window while a storm rages outside, warm lamp light, oil painting'

if __name__ == '__main__':
    sys.exit(run_example(DXQWEN, PROMPT, 'Qwen-Image in 4 network evaluations, with a DX policy.'))
