"""Learning rates against closed forms."""

import math

import pytest

from lakonlab.runner.lr_schedule import POLICIES, LearningRateSchedule


@pytest.mark.parametrize(
    ('config', 'iteration', 'expected'),
    [
        ({'policy': 'fixed'}, 99, 2.0),
        ({'policy': 'Fixed'}, 99, 2.0),
        ({'policy': 'step', 'step': 10}, 9, 2.0),
        ({'policy': 'step', 'step': 10}, 10, 0.2),
        ({'policy': 'step', 'step': 10, 'gamma': 0.5}, 35, 2 * 0.5**3),
        ({'policy': 'step', 'step': [20, 60]}, 19, 2.0),
        ({'policy': 'step', 'step': [20, 60]}, 20, 0.2),
        ({'policy': 'step', 'step': [20, 60]}, 60, 0.02),
        ({'policy': 'step', 'step': [20, 60], 'min_lr': 0.1}, 60, 0.1),
        ({'policy': 'exp', 'gamma': 0.99}, 3, 2 * 0.99**3),
        ({'policy': 'poly'}, 25, 1.5),
        ({'policy': 'poly', 'power': 2, 'min_lr': 1.0}, 50, 1.25),
        ({'policy': 'inv', 'gamma': 0.1, 'power': 2}, 10, 0.5),
        ({'policy': 'CosineAnnealing', 'min_lr': 0.0}, 0, 2.0),
        ({'policy': 'CosineAnnealing', 'min_lr': 0.0}, 50, 1.0),
        ({'policy': 'CosineAnnealing', 'min_lr_ratio': 0.1}, 100, 0.2),
        ({'policy': 'CosineAnnealing', 'min_lr': 0.0}, 25, 1 + math.cos(math.pi / 4)),
        ({'policy': 'FlatCosineAnnealing', 'min_lr': 0.0}, 74, 2.0),
        ({'policy': 'FlatCosineAnnealing', 'min_lr': 0.0, 'start_percent': 0.5}, 75, 1.0),
        ({'warmup': 'linear', 'warmup_iters': 10, 'warmup_ratio': 0.001}, 0, 0.002),
        ({'warmup': 'linear', 'warmup_iters': 10, 'warmup_ratio': 0.001}, 4, 2 * (1 - 0.6 * 0.999)),
        ({'warmup': 'linear', 'warmup_iters': 10, 'warmup_ratio': 0.001}, 10, 2.0),
        ({'warmup': 'constant', 'warmup_iters': 10, 'warmup_ratio': 0.5}, 9, 1.0),
        ({'warmup': 'constant', 'warmup_iters': 10, 'warmup_ratio': 0.5}, 10, 2.0),
        ({'warmup': 'exp', 'warmup_iters': 10, 'warmup_ratio': 0.01}, 5, 0.2),
        ({'policy': 'poly', 'warmup': 'linear', 'warmup_iters': 10, 'warmup_ratio': 0.1}, 5, 1.9 * 0.55),
    ],
)
def test_closed_form(config, iteration, expected):
    assert LearningRateSchedule(100, **config)(2.0, iteration) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ('config', 'message'),
    [
        ({'policy': 'cosine'}, r"policy='cosine' is unknown; choose one of .*CosineAnnealing"),
        ({'policy': 'fixed', 'gamma': 0.1}, "has no argument 'gamma'"),
        ({'policy': 'step'}, 'step'),
        ({'policy': 'CosineAnnealing'}, 'exactly one of min_lr and min_lr_ratio'),
        ({'warmup': 'cosine', 'warmup_iters': 5}, "'linear', 'constant', 'exp'"),
        ({'warmup': 'linear'}, 'warmup_iters=0'),
        ({'warmup': 'linear', 'warmup_iters': 5, 'warmup_ratio': 0}, 'warmup_ratio=0'),
        ({'by_epoch': True}, 'by_epoch'),
    ],
)
def test_wrong_config(config, message):
    with pytest.raises(ValueError, match=message):
        LearningRateSchedule(100, **config)


def test_never_negative_and_never_above_base():
    options = {
        'step': {'step': 7},
        'exp': {'gamma': 0.9},
        'inv': {'gamma': 0.1},
        'CosineAnnealing': {'min_lr': 0.0},
        'FlatCosineAnnealing': {'min_lr': 0.0},
    }
    for policy in POLICIES:
        schedule = LearningRateSchedule(50, policy, warmup='linear', warmup_iters=5, **options.get(policy, {}))
        assert all(0 <= schedule(3.0, iteration) <= 3.0 for iteration in range(50))
