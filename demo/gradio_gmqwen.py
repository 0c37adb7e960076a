#!/usr/bin/env python
"""A web page for Qwen-Image in 4 or more network evaluations.

python demo/gradio_gmqwen.py --offload model
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lakonlab.ui.generate_app import run_app
from lakonlab.ui.pipeline_options import GMQWEN

if __name__ == '__main__':
    sys.exit(run_app((GMQWEN,), 'pi-Flow: Qwen-Image in a few steps', (4, 50, 4, 1)))
