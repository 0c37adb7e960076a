"""One small teacher and one uninterrupted run of each kind, shared by the tests of interruptions."""

import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.tools.training import DATA_BASED, DATA_FREE, TEACHER, Training

TOTAL_ITERS = 96
ITERS_OF_SEVERAL = 42
"""Length of a run of two processes, whose start costs more."""
SAVE_INTERVAL = 2


@pytest.fixture(scope='session')
def new_training(tmp_path_factory):
    """Makes a training of a student in a new directory that holds a trained teacher."""
    teacher = Training(tmp_path_factory.mktemp('teacher'), TEACHER, {'total_iters': 6})
    teacher.run()

    def make(name: str, config: str, processes: int = 1, **changes) -> Training:
        folder = tmp_path_factory.mktemp(name)
        shutil.copytree(teacher.checkpoints, folder / 'checkpoints' / TEACHER)
        options = {
            'total_iters': TOTAL_ITERS,
            'checkpoint_config.interval': SAVE_INTERVAL,
            'checkpoint_config.must_save_interval': 32,
            **changes,
        }
        return Training(folder, config, options, processes=processes)

    return make


@pytest.fixture(scope='session')
def uninterrupted(new_training):
    """Config -> a run that nothing interrupted."""
    references = {config: new_training('uninterrupted', config) for config in (DATA_BASED, DATA_FREE)}
    with ThreadPoolExecutor() as pool:
        list(pool.map(Training.run, references.values()))
    return references


@pytest.fixture(scope='session')
def uninterrupted_in_two_processes(new_training):
    """Strategy -> a run of two processes that nothing interrupted, made when first asked for."""
    references = {}

    def make(strategy: str) -> Training:
        if strategy not in references:
            options = {'module_wrapper': strategy, 'total_iters': ITERS_OF_SEVERAL}
            references[strategy] = new_training(f'uninterrupted_{strategy}', DATA_BASED, processes=2, **options)
            references[strategy].run()
        return references[strategy]

    return make
