#!/usr/bin/env python
"""A static policy follows a whole trajectory of Qwen-Image.

As train_piflow_dit_imagenet_toymodel.py, where the idea is explained, for a prompt and a text-to-image teacher.

python demo/train_piflow_qwen_toymodel.py --prompt "a red fox in the snow"
python demo/train_piflow_qwen_toymodel.py --teacher FOLDER --h 256 --w 256     a pipeline that diffusers has saved
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lakonlab.ui.static_policy_demo import prompt_demo

if __name__ == '__main__':
    sys.exit(prompt_demo(__doc__))
