#!/usr/bin/env python
"""FLUX.1-dev in 4 network evaluations, with a GMFlow policy.

python demo/example_gmflux_pipeline.py --benchmark
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lakonlab.ui.generate_example import run_example
from lakonlab.ui.pipeline_options import GMFLUX

PROMPT = 'A lighthouse keeper reads a letter by the window while a storm rages outside, warm lamp light, oil painting'

if __name__ == '__main__':
    sys.exit(run_example(GMFLUX, PROMPT, 'FLUX.1-dev in 4 network evaluations, with a GMFlow policy.'))
