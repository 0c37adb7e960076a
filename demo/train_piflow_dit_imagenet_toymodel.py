#!/usr/bin/env python
"""A static policy follows a whole trajectory of an ImageNet teacher, or of the digits teacher on a CPU.

A pi-Flow student looks at the noise once and answers with a policy that must then lead all the way to the image. How
well can one policy do that? Here is no network: for one noise and one class the parameters of the policy themselves are
trained, by the same imitation of a frozen teacher (Chen et al., "pi-Flow", 2025). The picture shows both trajectories.

as published, a jay, made for a GPU:
    python demo/train_piflow_dit_imagenet_toymodel.py
a digit, in a minute of one CPU core, with the teacher that `make demo` trains:
    python demo/train_piflow_dit_imagenet_toymodel.py --teacher checkpoints/dit_digits_teacher/latest \\
        --num-iters 3000 --lr-schedule cosine
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lakonlab.ui.static_policy_demo import class_demo

if __name__ == '__main__':
    sys.exit(class_demo(__doc__))
