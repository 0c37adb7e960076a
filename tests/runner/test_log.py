"""Logging settings and the window of averaged values."""

import json

import pytest
import torch

from lakonlab.mmengine_parts import MessageHub
from lakonlab.runner.log import load_log_window, log_settings, log_window, memory_megabytes


def test_documented_form():
    settings = log_settings(
        {
            'interval': 10,
            'hooks': [
                {'type': 'TextLoggerHook'},
                {'type': 'TensorboardLoggerHook'},
                {'type': 'WandbLoggerHook', 'init_kwargs': {'project': 'PiFlow'}},
            ],
        },
        'logs',
    )
    assert settings.interval == 10
    assert settings.backends == [
        {'type': 'LocalVisBackend', 'save_dir': 'logs'},
        {'type': 'TensorboardVisBackend', 'save_dir': 'logs/tf_logs'},
        {'type': 'WandbVisBackend', 'save_dir': 'logs', 'init_kwargs': {'project': 'PiFlow'}},
    ]


def test_default_writes_to_tensorboard():
    assert [backend['type'] for backend in log_settings(None, 'logs').backends] == [
        'LocalVisBackend',
        'TensorboardVisBackend',
    ]


@pytest.mark.parametrize(
    ('config', 'message'),
    [
        ({'intervall': 10}, 'intervall'),
        ({'hooks': [{'type': 'PaviLoggerHook'}]}, "'PaviLoggerHook' is unknown"),
        ({'hooks': [{'type': 'WandbLoggerHook', 'project': 'x'}]}, "no argument 'project'"),
        ({'interval': 5, 'hooks': [{'type': 'TextLoggerHook', 'interval': 7}]}, 'log_config.interval'),
    ],
)
def test_wrong_config(config, message):
    with pytest.raises(ValueError, match=message):
        log_settings(config, 'logs')


def test_window_survives_being_saved():
    hub = MessageHub('a')
    for value in (1 / 3, 2 / 7, float('nan'), 0.1, 5e-324):
        hub.update_scalar('train/loss', value)
    restored = MessageHub('b')
    load_log_window(restored, json.loads(json.dumps(log_window(hub))), interval=3)
    hub.get_scalar('train/loss').max_length = 3
    for each in (hub, restored):
        each.update_scalar('train/loss', 0.7)
    assert restored.get_scalar('train/loss').mean(3) == hub.get_scalar('train/loss').mean(3)
    assert len(restored.get_scalar('train/loss').data[0]) == 3


def test_memory_is_that_of_this_process():
    before = memory_megabytes(torch.device('cpu'))
    block = torch.ones(50, 2**18)
    assert memory_megabytes(torch.device('cpu')) - before == pytest.approx(50, abs=10)
    del block
