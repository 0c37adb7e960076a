"""SIGTERM and Ctrl-C to the real command in two processes: saved, gone within a bound, and resumed bit for bit."""

import os
import signal
import time
from dataclasses import replace

import pytest

from tests.tools.training import DATA_BASED, assert_same_run, descendants, wait_until_gone

SECONDS_TO_END = 30
"""What torchrun grants; on an idle machine it takes two or three seconds, most of them to take down Python."""


def stop(training, whom, number):
    """Start a run, stop it after some saves; returns torchrun's exit status and what was printed."""
    process = training.start()
    goal = training.newest_step + 4
    training.wait_for(process, lambda: training.newest_step >= goal)
    everyone, workers = descendants(process.pid), training.workers(process)
    before = len(training.output)
    begin = time.monotonic()
    os.kill(process.pid if whom == 'torchrun' else workers[whom], number)
    status = process.wait(2 * SECONDS_TO_END)
    assert time.monotonic() - begin < SECONDS_TO_END
    assert not wait_until_gone(everyone, 10)
    return status, training.output[before:]


def test_saved_and_resumed(new_training, uninterrupted_in_two_processes):
    whole = uninterrupted_in_two_processes('fsdp2')
    training = new_training('stopped', DATA_BASED, processes=2, **whole.options)
    loading_beside = replace(training, options={**training.options, 'data.workers_per_gpu': 2})

    status, printed = stop(loading_beside, 'torchrun', signal.SIGTERM)
    step = training.newest_step
    assert f'stopped by SIGTERM after iteration {step}, saved in checkpoints/{DATA_BASED}' in printed
    assert printed.count('SIGTERM: stopping after this iteration and saving') == 2
    assert status == 1  # torchrun's own, whatever its processes end with

    status, printed = stop(loading_beside, 1, signal.SIGINT)
    assert f'resuming after iteration {step} from' in training.output
    step = training.newest_step
    assert f'stopped by a signal to another process after iteration {step}, saved' in printed
    assert sorted(line.split()[2] for line in printed.splitlines() if 'exitcode  :' in line) == ['130', '143']
    assert status == 1

    training.run()
    assert f'resuming after iteration {step} from' in training.output
    assert_same_run(training, whole)


@pytest.mark.slow
@pytest.mark.parametrize('whom', ['torchrun', 0])
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize('strategy', ['ddp', 'fsdp2'])
def test_every_combination(new_training, uninterrupted_in_two_processes, strategy, number, whom):
    whole = uninterrupted_in_two_processes(strategy)
    training = new_training('stopped', DATA_BASED, processes=2, **whole.options)
    _, printed = stop(training, whom, number)
    assert f'stopped by {number.name} after iteration {training.newest_step}, saved' in printed
    training.run()
    assert_same_run(training, whole)


@pytest.mark.slow
def test_twice_is_at_once(new_training, uninterrupted_in_two_processes):
    whole = uninterrupted_in_two_processes('ddp')
    training = new_training('stopped', DATA_BASED, processes=2, **whole.options)
    process = training.start()
    training.wait_for(process, lambda: training.newest_step >= 4)
    everyone, workers = descendants(process.pid), training.workers(process)
    for _ in range(2):
        os.kill(workers[0], signal.SIGTERM)
        time.sleep(0.01)
    assert not wait_until_gone(workers[:1], 2)
    assert process.wait(2 * SECONDS_TO_END) == 1
    assert not wait_until_gone(everyone, 10)
    assert 'exitcode  : 143' in training.output
    training.run()
    assert_same_run(training, whole)
