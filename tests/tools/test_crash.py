"""A run of the real command that is killed at 20 random moments ends like one that is not.

Two runs are killed ten times each, side by side. A checkpoint is written after every second iteration, so that many of
the kills hit a save; a few hit the start of the process.
"""

import random
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from lakonlab.storage.checkpoint import find_checkpoint
from tests.tools.conftest import TOTAL_ITERS
from tests.tools.training import DATA_BASED, DATA_FREE, assert_same_run

KILLS_PER_RUN = 10


def kill_repeatedly(training, seed):
    """Start and kill a run; returns how far its checkpoints had come at each kill."""
    draw = random.Random(seed)
    steps = []
    for number in range(KILLS_PER_RUN):
        process = training.start()
        at_start = training.newest_step
        if number % 5 == 3:
            time.sleep(draw.uniform(0.5, 5))
        else:
            # spread over the whole run, so that the last victim still has something to do
            goal = min(at_start + 2, TOTAL_ITERS - 20)
            training.wait_for(process, lambda goal=goal: training.newest_step >= goal)
            time.sleep(draw.uniform(0, 0.25))
        assert process.poll() is None, training.output
        process.kill()
        process.wait()
        steps.append(training.newest_step)
        found = find_checkpoint(training.checkpoints)
        assert (int(found.name.removeprefix('iter_')) if found else 0) == training.newest_step
    return steps


@pytest.fixture(scope='module')
def survivors(new_training):
    trainings = {config: new_training('crashed', config) for config in (DATA_BASED, DATA_FREE)}
    with ThreadPoolExecutor() as pool:
        steps = list(pool.map(kill_repeatedly, trainings.values(), (1, 2)))
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
