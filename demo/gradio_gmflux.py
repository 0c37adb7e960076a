#!/usr/bin/env python
"""A web page for FLUX.1-dev in 4 or 8 network evaluations, with an adapter for each.

python demo/gradio_gmflux.py --offload model
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lakonlab.ui.generate_app import run_app
from lakonlab.ui.pipeline_options import GMFLUX, GMFLUX_8

if __name__ == '__main__':
    sys.exit(run_app((GMFLUX, GMFLUX_8), 'pi-Flow: FLUX.1-dev in a few steps', (4, 8, 4, 4)))
