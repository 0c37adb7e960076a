"""Logging settings, log files by rank, speed and shares of time in log lines, and the window of averaged values."""

import json
import logging
import multiprocessing
import os
import time
from types import SimpleNamespace

import pytest
import torch

from lakonlab.mmengine_parts import MessageHub
from lakonlab.phases import PhaseClock, phase
from lakonlab.runner.log import (
    LineProcessor,
    ThroughputHook,
    attach_log_handlers,
    count_text_tokens,
    detach_log_handlers,
    load_log_window,
    log_settings,
    log_window,
    memory_megabytes,
)
from tests.tiny_text_image import batch


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
        {'type': 'WandbBackend', 'save_dir': 'logs', 'init_kwargs': {'project': 'PiFlow'}},
    ]


def test_default_writes_to_tensorboard():
    assert [backend['type'] for backend in log_settings(None, 'logs').backends] == [
        'LocalVisBackend',
        'TensorboardVisBackend',
    ]


@pytest.mark.parametrize(
    ('config', 'message'),
    [
        ({'intervall': 10}, "'intervall'.*'all_ranks'"),
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


def test_memory_is_the_most_of_this_process():
    """In a process of its own, since the tests before may have taken more."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = os.fork()
    if child == 0:
        before = memory_megabytes(torch.device('cpu'))
        block = b'1' * (50 << 20)
        del block
        sender.send((before, memory_megabytes(torch.device('cpu'))))
        os._exit(0)
    os.waitpid(child, 0)
    before, after = receiver.recv()
    assert after - before == pytest.approx(50, abs=10)


def test_every_rank_may_have_a_file():
    assert not log_settings(None, 'logs').all_ranks
    assert log_settings({'all_ranks': True}, 'logs').all_ranks


@pytest.mark.parametrize(
    ('rank', 'level', 'all_ranks', 'file', 'in_file', 'on_console'),
    [
        (0, 'INFO', False, 'run.log', ['info', 'warning'], ['info', 'warning']),
        (0, 'DEBUG', False, 'run.log', ['debug', 'info', 'warning'], ['debug', 'info', 'warning']),
        (3, 'INFO', False, None, [], ['warning']),
        (3, 'INFO', True, 'run_rank3.log', ['info', 'warning'], ['warning']),
        (3, 'DEBUG', False, 'run_rank3.log', ['debug', 'info', 'warning'], ['warning']),
        (3, 'ERROR', False, None, [], []),
    ],
)
def test_who_logs_what_and_where(tmp_path, capsys, rank, level, all_ranks, file, in_file, on_console):
    handlers = attach_log_handlers(tmp_path / 'run.log', level, rank=rank, all_ranks=all_ranks)
    for name in ('debug', 'info', 'warning'):
        getattr(logging.getLogger('lakonlab.runner'), name)('this is %s', name)
    detach_log_handlers(handlers)
    logging.getLogger('lakonlab.runner').error('after')
    logging.getLogger('lakonlab').setLevel('INFO')  # for what other tests expect to be logged
    assert [path.name for path in tmp_path.iterdir()] == ([] if file is None else [file])
    written = [] if file is None else (tmp_path / file).read_text().splitlines()
    assert [line.split()[-1] for line in written] == in_file
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in printed] == on_console
    assert all(line.startswith('rank 3: ') == (rank == 3) for line in printed)


def test_tokens_of_prompts():
    flux, qwen = batch('Flux', batch_size=3, text_length=5), batch('Qwen', batch_size=3, text_length=5)
    assert count_text_tokens(flux) == 15
    assert count_text_tokens(qwen) == 13  # the first prompt is two tokens shorter
    assert count_text_tokens({'latents': flux['latents']}) == count_text_tokens({'prompt_embed_kwargs': None}) == 0
    assert count_text_tokens(None) == 0


class Run:
    """What the hook and the log line read of a run of two processes."""

    def __init__(self, name, max_iters=6):
        self.message_hub, self.max_iters, self.iter = MessageHub(name), max_iters, 0
        self.batch_size, self.world_size = 16, 2
        self.strategy = SimpleNamespace(device=torch.device('cpu'))
        self._train_loop = object()

    def iterate(self, hook, seconds, data_batch=None):
        """One iteration, as mmengine's timer leaves it to the hook."""
        self.message_hub.update_scalar('train/time', seconds)
        self.message_hub.update_scalar('train/data_time', 0.0)
        hook.after_train_iter(self, self.iter, data_batch)
        self.iter += 1

    def figures(self):
        scalars = self.message_hub.log_scalars
        return {name.removeprefix('train/'): buffer.current() for name, buffer in scalars.items()}


def test_speed_is_that_of_the_last_window_over_all_processes():
    run, hook = Run('speed'), ThroughputHook(interval=2)
    prompts = batch('Flux', batch_size=8, text_length=5)
    run.iterate(hook, 1.0, prompts)
    assert 'it_per_s' not in run.figures()
    run.iterate(hook, 3.0, prompts)
    figures = run.figures()
    assert figures['it_per_s'] == 1 / 2
    assert figures['samples_per_s'] == 16 / 2
    assert figures['tokens_per_s'] == 2 * 8 * 5 / 2
    run.iterate(hook, 0.1, prompts)
    run.iterate(hook, 0.3, batch('Flux', batch_size=8, text_length=10))
    assert run.figures()['samples_per_s'] == pytest.approx(16 / 0.2)
    assert run.figures()['tokens_per_s'] == pytest.approx(2 * 8 * 15 / 0.4)
    assert not any(name.startswith('share') for name in run.figures())  # there is no clock


def test_line_says_what_the_time_went_into():
    run, hook = Run('shares', max_iters=3), ThroughputHook(interval=1)
    with PhaseClock(torch.device('cpu')).active():
        with phase('student'):
            time.sleep(0.01)
            with phase('teacher'):
                time.sleep(0.03)
        run.iterate(hook, 0.05, {})
        first = run.figures()
        run.message_hub.update_scalar('train/loss', 0.25)
        run.message_hub.update_info('eta', 3)
        scalars, line = LineProcessor(by_epoch=False).get_log_after_iter(run, 0, 'train')
        with phase('evaluation'):
            time.sleep(0.01)
        run.iterate(hook, 0.05, {})
    shares = {name: value for name, value in first.items() if name.startswith('share_')}
    assert sum(shares.values()) == pytest.approx(1)
    assert shares['share_teacher'] > shares['share_student'] > shares['share_rollout'] == 0
    assert {name: scalars[name] for name in first} == pytest.approx(first)  # the backends get everything
    percent = [f'{name} {round(100 * shares[f"share_{name}"])} %' for name in ('teacher', 'student')]
    assert f'share: {percent[0]}, {percent[1]}' in line
    assert 'share_' not in line
    assert 'rollout' not in line
    assert 'it_per_s: 20  samples_per_s: 320  ' in line
    assert 'loss: 0.2500' in line
    second = run.figures()
    assert second['share_evaluation'] > 0.5
    assert second['share_teacher'] == 0
