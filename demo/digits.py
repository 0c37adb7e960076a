#!/usr/bin/env python
"""The main job on real handwritten digits, from nothing to a distilled one-step generator and a report.

python demo/digits.py                 teacher, one-step and two-step student (minutes on two CPU cores)
python demo/digits.py --all           also the DX student and the one trained without data
python demo/digits.py --seeds 3       three times, with different seeds
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lakonlab.ui.digits_demo import main

if __name__ == '__main__':
    sys.exit(main())
