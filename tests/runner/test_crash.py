"""A run of two processes that is killed at random moments ends like one that is not.

The processes are forked from a server that has imported everything, so that 200 kills take minutes; the same with the
real command is in ``tests/tools/test_crash.py``. ``CRASH_SEED=n`` draws other moments.
"""

import contextlib
import json
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest

from lakonlab.storage import files
from lakonlab.storage.checkpoint import list_checkpoints, step_of
from lakonlab.storage.remote_path import as_path
from tests.processes import ProcessFailedError, ProcessPool
from tests.runner import small_run
from tests.storage.test_interrupted_save import is_complete

SEED = int(os.environ.get('CRASH_SEED', '0'))


def writers_of(pid):
    """Processes that write checkpoints for a process."""
    children = Path(f'/proc/{pid}/task/{pid}/children').read_text().split()
    return [int(child) for child in children if b'writer_process' in Path(f'/proc/{child}/cmdline').read_bytes()]


class Victim:
    """A run in a folder that is started and killed again and again."""

    def __init__(self, folder, strategy, total_iters, draw, place=None, environment=None):
        self.folder, self.strategy, self.total_iters, self.draw = folder, strategy, total_iters, draw
        self.place, self.environment = place, environment
        self.pool = ProcessPool(2)
        self.done = []

    @property
    def run_dir(self):
        return small_run.checkpoints(self.folder) if self.place is None else as_path(self.place) / small_run.NAME

    @property
    def committed(self):
        return max(map(step_of, list_checkpoints(self.run_dir)), default=0)

    def train(self, **changes):
        options = dict(strategy=self.strategy, total_iters=self.total_iters, checkpoint_config__out_dir=self.place)
        return self.pool.run(small_run.train, self.folder, self.environment, timeout=600, **options, **changes)

    def kill_once(self):
        """Start the run, and kill one of its processes or all."""
        before = self.committed
        in_background = self.draw.random() < 0.25
        whom = self.draw.choice(['one', 'all', 'writer'] if in_background else ['one', 'all'])
        ended = threading.Event()

        outcome = []

        def run():
            try:
                outcome.append(self.train(checkpoint_config__asynchronous=in_background))
            except Exception as error:
                outcome.append(error)
            ended.set()

        self.pool.close()
        self.pool.__enter__()
        pids = self.pool.pids
        thread = threading.Thread(target=run)
        thread.start()
        goal = min(before + 2 * self.draw.randint(0, 2), self.total_iters - 10)
        while self.committed < goal and not ended.is_set():
            time.sleep(0.002 if self.place is None else 0.05)  # a server has other things to do than to answer us
        time.sleep(self.draw.uniform(0, 0.15 if goal > before else 1.0))
        assert not ended.is_set(), f'{outcome} after {self.done}'
        committed = self.committed
        writers = writers_of(self.draw.choice(pids)) if whom == 'writer' else []
        if whom == 'writer' and not writers:  # not started yet
            whom = 'all'
        victims = {'one': [self.draw.choice(pids)], 'all': pids, 'writer': writers}[whom]
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if whom == 'writer':  # what it belongs to has to notice
            assert ended.wait(60)
        thread.join()
        assert isinstance(outcome[0], ProcessFailedError), f'{outcome} after {self.done}'
        assert self.committed >= committed >= before
        assert all(is_complete(path) for path in list_checkpoints(self.run_dir))
        self.done.append((whom, in_background, before, self.committed))


@pytest.fixture
def crash(tmp_path):
    """Kills a run some times, lets it finish, and compares it with one that nobody killed."""

    def survive(strategy, kills, place=None, environment=None):
        total_iters = 4 * kills + (20 if place is None else 12)
        folder, whole = tmp_path / f'{strategy}_killed', tmp_path / f'{strategy}_whole'
        folder.mkdir()
        whole.mkdir()
        draw = random.Random(f'{strategy} {kills} {SEED}')
        victim = Victim(folder, strategy, total_iters, draw, place, environment)
        run_dir = victim.run_dir
        try:
            for _ in range(kills):
                victim.kill_once()
            victim.train()
            victim.folder, victim.place = whole, None
            victim.train()
        finally:
            victim.pool.kill()
        assert 0 < victim.done[-1][-1] < total_iters, victim.done
        small_run.assert_same_run(folder, whole, run_dir)
        names = {path.name for path in run_dir.iterdir()}
        assert names - {'.lock'} == {f'iter_{total_iters - 2}', f'iter_{total_iters}'}
        return run_dir

    return survive


def test_killed_at_a_few_moments(crash):
    crash('fsdp2', 6)


@pytest.mark.slow
@pytest.mark.parametrize('strategy', ['ddp', 'fsdp2'])
def test_killed_at_many_moments(crash, strategy):
    crash(strategy, 100)


@pytest.mark.parametrize('kills', [2, pytest.param(40, marks=pytest.mark.slow)])
def test_killed_while_saving_to_a_server(crash, swift, swift_bucket, kills):
    run_dir = crash('fsdp2', kills, swift_bucket, swift.environment())
    folders = {f'{path.name}/{json.loads((path / "manifest.json").read_text())["data"]}' for path in run_dir.iterdir()}
    assert {'/'.join(info.name.split('/')[:2]) for info in files.list_files(str(run_dir))} == {
        *folders,
        *(f'{path.name}/manifest.json' for path in run_dir.iterdir()),
    }
