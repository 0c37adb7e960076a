"""Hooks and loader arguments from a config."""

import pytest
from mmengine.config import Config

from lakonlab.runner.sections import build_hooks, training_loader_options


def test_hooks_with_priorities():
    cfg = Config(
        {
            'custom_hooks': [
                {'type': 'ExponentialMovingAverageHook', 'priority': 'HIGH'},
                {'type': 'ExponentialMovingAverageHook', 'module_keys': ('other_ema',)},
            ],
            'evaluation': [{'type': 'GenerativeEvalHook', 'data': 'val'}],
            'checkpoint_config': {'interval': 5},
        }
    )
    described = [(type(hook).__name__, hook.priority) for hook in build_hooks(cfg)]
    assert described == [
        ('ExponentialMovingAverageHook', 'HIGH'),
        ('ExponentialMovingAverageHook', 'VERY_HIGH'),
        ('GenerativeEvalHook', 'LOW'),
        ('CheckpointHook', 'VERY_LOW'),
    ]
    assert len(build_hooks(cfg, validate=False)) == 3
    assert build_hooks(Config({'checkpoint_config': None})) == []


def test_loader_options():
    data = {
        'workers_per_gpu': 2,
        'samples_per_gpu': 4,
        'train': {'type': 'Digits'},
        'val2': {'type': 'Digits'},
        'test_dataloader': {'samples_per_gpu': 9},
        'train_dataloader': {'samples_per_gpu': 8, 'prefetch_factor': 2},
    }
    assert training_loader_options(data) == {'workers_per_gpu': 2, 'samples_per_gpu': 8, 'prefetch_factor': 2}
    with pytest.raises(ValueError, match='batch size of one process'):
        training_loader_options({'train': {}})
