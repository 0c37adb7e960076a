#!/usr/bin/env python
"""A web page on which teacher and students draw the same digit, with the weights that `make demo` has trained.

python demo/gradio_digits.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lakonlab.ui.digits_app import run_digits_app

if __name__ == '__main__':
    sys.exit(run_digits_app())
