"""Runs of the real command that are killed at random moments end like those that are not.

A checkpoint is written after every second iteration, so that many of the kills hit a save; some hit the start of the
process. ``make test`` kills ten times; ``CRASH_KILLS=100 CRASH_SEED=1 pytest -m slow tests/tools/test_crash.py`` kills
each run of two processes as often as that. For 200 kills in minutes see ``tests/runner/test_crash.py``.
"""

import json
import os
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from lakonlab.storage import files
from lakonlab.storage.checkpoint import find_checkpoint
from tests.tools.conftest import TOTAL_ITERS
from tests.tools.training import (
    DATA_BASED,
    DATA_FREE,
    assert_same_run,
    children,
    command_line,
    descendants,
    wait_until_gone,
)

KILLS_OF_ONE_PROCESS = 3
KILLS_OF_SEVERAL = 4
MANY_KILLS = int(os.environ.get('CRASH_KILLS', '10'))
SEED = int(os.environ.get('CRASH_SEED', '0'))
VICTIMS = ('writer', 'everything', 'one', 'workers')
"""Who is killed: the writer of one process, torchrun and what it has started, one process, all processes."""
SECONDS_TO_END = 60
"""How long the others may take to notice; torchrun itself gives them 30."""


def wait_for_the_moment(training, process, draw, at_start, total_iters):
    """Wait until some random moment in the start of a run, or about a save."""
    before = training.newest_step
    if at_start:
        time.sleep(draw.uniform(0.5, 5))
    else:
        # spread over the whole run, so that the last victim still has something to do
        goal = min(before + 2, total_iters - 20)
        training.wait_for(process, lambda: training.newest_step >= goal)
        time.sleep(draw.uniform(0, 0.25))
    assert process.poll() is None, training.output
    return training.newest_step


def check_what_is_left(training, committed):
    newest = training.newest_step
    assert newest >= committed
    found = find_checkpoint(training.checkpoints)
    assert (int(found.name.removeprefix('iter_')) if found else 0) == newest
    return newest


def kill_repeatedly(training, seed):
    """Start and kill a run of one process; returns how far its checkpoints had come at each kill."""
    draw = random.Random(seed)
    steps = []
    for number in range(KILLS_OF_ONE_PROCESS):
        process = training.start()
        committed = wait_for_the_moment(training, process, draw, number == 1, TOTAL_ITERS)
        process.kill()
        process.wait()
        steps.append(check_what_is_left(training, committed))
    return steps


@pytest.fixture(scope='module')
def survivors(new_training):
    trainings = {config: new_training('crashed', config) for config in (DATA_BASED, DATA_FREE)}
    with ThreadPoolExecutor() as pool:
        steps = list(pool.map(kill_repeatedly, trainings.values(), (f'{SEED} 1', f'{SEED} 2')))
        list(pool.map(lambda training: training.run(), trainings.values()))
    return trainings, dict(zip(trainings, steps))


@pytest.mark.parametrize('config', [DATA_BASED, DATA_FREE])
def test_killed_at_random_moments(survivors, uninterrupted, config):
    trainings, steps = survivors
    assert steps[config] == sorted(steps[config])
    assert 0 < steps[config][-1] < TOTAL_ITERS
    assert_same_run(trainings[config], uninterrupted[config])


@pytest.mark.parametrize('config', [DATA_BASED, DATA_FREE])
def test_nothing_is_left_behind(survivors, config):
    trainings, _ = survivors
    names = {path.name for path in trainings[config].checkpoints.iterdir()}
    assert names == {'.lock', 'iter_32', 'iter_64', 'iter_96'}


def kill_one_of_several(training, draw, whom, at_start, total_iters):
    """Start a run of several processes and kill one, or more of them; returns how far its checkpoints had come."""
    process = training.start()
    committed = wait_for_the_moment(training, process, draw, at_start, total_iters)
    everyone, workers = descendants(process.pid), training.workers(process)
    victim = draw.choice(workers) if workers else None
    writers = [pid for pid in children(victim or 0) if 'writer_process' in command_line(pid)]
    chosen = {'one': [victim], 'writer': writers, 'workers': workers}.get(whom) if victim else None
    # the writers are left to themselves, and end with the processes they belong to
    for pid in chosen or [process.pid, *workers]:
        os.kill(pid, signal.SIGKILL)
    assert process.wait(SECONDS_TO_END) != 0, training.output
    assert not wait_until_gone(everyone, 10)
    return check_what_is_left(training, committed)


def check_survivor(killed, whole, kills):
    """Kill a run so many times, let it finish, and compare it with one that nobody killed."""
    total_iters = killed.options['total_iters']
    draw = random.Random(f'{killed.options["module_wrapper"]} {SEED}')
    steps = [
        kill_one_of_several(killed, draw, VICTIMS[number % len(VICTIMS)], number % 5 == 3, total_iters)
        for number in range(kills)
    ]
    assert 0 < steps[-1] < total_iters
    killed.run()
    assert_same_run(killed, whole)
    names = {path.name for path in killed.checkpoints.iterdir()} - {'.lock'}
    assert names == {path.name for path in whole.checkpoints.iterdir()} - {'.lock'}
    assert f'iter_{total_iters}' in names


def test_several_processes(new_training, uninterrupted_in_two_processes):
    whole = uninterrupted_in_two_processes('fsdp2')
    check_survivor(new_training('killed', DATA_BASED, processes=2, **whole.options), whole, KILLS_OF_SEVERAL)


@pytest.mark.slow
@pytest.mark.parametrize('strategy', ['ddp', 'fsdp2'])
def test_several_processes_many_times(new_training, strategy):
    options = {'module_wrapper': strategy, 'total_iters': 4 * MANY_KILLS + 30}
    whole, killed = (new_training(name, DATA_BASED, processes=2, **options) for name in ('whole', 'killed'))
    whole.run()
    check_survivor(killed, whole, MANY_KILLS)


@pytest.mark.slow
@pytest.mark.parametrize('strategy', ['ddp', 'fsdp2'])
def test_several_processes_that_save_to_a_server(new_training, bucket, strategy):
    kills = max(MANY_KILLS // 2, 2)
    options = {'module_wrapper': strategy, 'total_iters': 4 * kills + 30}
    whole, killed = (new_training(name, DATA_BASED, processes=2, **options) for name in ('whole', 'killed'))
    killed.place = f'{bucket}/checkpoints'
    whole.run()
    check_survivor(killed, whole, kills)
    names = {info.name.split('/')[1] for info in files.list_files(str(killed.checkpoints))}
    kept = {json.loads((path / 'manifest.json').read_text())['data'] for path in killed.checkpoints.iterdir()}
    assert names == {'manifest.json', *kept}


@pytest.mark.slow
def test_processes_without_their_launcher_keep_the_directory(new_training):
    """Killing torchrun alone does not end its processes; another run says so instead of writing beside them."""
    training = new_training('orphans', DATA_BASED, processes=2, total_iters=100_000)
    process = training.start()
    training.wait_for(process, lambda: training.newest_step >= 2)
    everyone, workers = descendants(process.pid), training.workers(process)
    process.kill()
    process.wait()
    try:
        before = training.newest_step
        second = training.start()
        assert second.wait(120) == 1
        assert f'is in use by another run (process {workers[0]} on' in training.output
        assert training.output.count('is in use by another run') == 1
        assert training.newest_step > before
    finally:
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
    assert not wait_until_gone(everyone, 10)
