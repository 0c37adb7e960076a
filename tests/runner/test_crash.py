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

from lakonlab.mmengine_parts import Hook
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


class Start(Hook):
    """Writes into a file from which iteration on each process trains."""

    def __init__(self, file):
        self.file = file

    def before_train(self, runner):
        with self.file.open('a') as file:
            file.write(f'{runner.first_iter}\n')


def train(ranks, folder, environment=None, **changes):
    """What :func:`tests.runner.small_run.train` does, with a hook that says where it began."""
    return small_run.train(ranks, folder, environment, [Start(folder / 'starts.txt')], **changes)


ROUNDS = (('writer', 'one', 'all'), ('writer', 'all', 'one'), ('one', 'writer', 'all'), ('all', 'writer', 'one'))
"""Who is killed in three turns: a process that writes, one of those that train, all. In the third nothing is written in
the background."""


class Victim:
    """A run in a folder that is started and killed again and again; two of three times it writes in the background."""

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

    @property
    def newest(self):
        """The same of what is complete by its checksums."""
        paths = self.run_dir.iterdir() if self.run_dir.is_dir() else []
        names = [path.name for path in paths if path.name.startswith('iter_') and is_complete(path)]
        return max((int(name.removeprefix('iter_')) for name in names), default=0)

    def train(self, **changes):
        options = dict(strategy=self.strategy, total_iters=self.total_iters, checkpoint_config__out_dir=self.place)
        return self.pool.run(train, self.folder, self.environment, timeout=600, **options, **changes)

    def kill_once(self):
        """Start the run, and kill one of its processes or all."""
        turn = len(self.done) % 3
        if turn == 0:
            self.round = self.draw.choice(ROUNDS)
        whom, in_background = self.round[turn], turn != 2
        before = self.newest
        starts = self.folder / 'starts.txt'
        starts.write_text('')
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
        # writers are started by the first save
        goal = min(before + 2 * self.draw.randint(int(whom == 'writer'), 2), self.total_iters - 10)
        while self.committed < goal and not ended.is_set():
            time.sleep(0.002 if self.place is None else 0.05)  # a server has other things to do than to answer us
        time.sleep(self.draw.uniform(0, 0.15 if goal > before else 1.0))
        assert not ended.is_set(), f'{outcome} after {self.done}'
        committed = self.committed
        someone = self.draw.choice(pids)
        victims = {'one': [someone], 'all': pids, 'writer': writers_of(someone)}[whom]
        assert victims, f'{whom} after {self.done}'
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if whom == 'writer':  # what it belongs to has to notice
            assert ended.wait(60)
        thread.join()
        assert isinstance(outcome[0], ProcessFailedError), f'{outcome} after {self.done}'
        assert self.committed >= committed >= before
        started = starts.read_text().split()
        assert started == [str(before)] * len(started), self.done
        assert len(started) == 2 or self.committed == before
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
            newest = victim.newest
            assert victim.train() == [newest, newest]
            victim.folder, victim.place = whole, None
            assert victim.train() == [0, 0]
        finally:
            victim.pool.kill()
        assert 0 < newest < total_iters, victim.done
        assert {whom for whom, *_ in victim.done} == {'one', 'all', 'writer'}
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


@pytest.mark.parametrize('kills', [3, pytest.param(40, marks=pytest.mark.slow)])
def test_killed_while_saving_to_a_server(crash, s3_server, bucket, kills):
    run_dir = crash('fsdp2', kills, bucket, s3_server.environment())
    folders = {f'{path.name}/{json.loads((path / "manifest.json").read_text())["data"]}' for path in run_dir.iterdir()}
    assert {'/'.join(info.name.split('/')[:2]) for info in files.list_files(str(run_dir))} == {
        *folders,
        *(f'{path.name}/manifest.json' for path in run_dir.iterdir()),
    }
