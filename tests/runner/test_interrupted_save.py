"""A run of two processes whose save dies, or finds the disk full, at any file operation goes on as if nothing was."""

import os
import shutil
from pathlib import Path

import pytest

from tests import processes
from tests.faults import Fault, active, environment
from tests.processes import ProcessFailedError, workers  # noqa: F401
from tests.runner import small_run

MARK = '.iter_8.tmp-'
END = 10


def train_with_fault(ranks, folder, fault, rank, strategy, in_writer):
    """Train while one process, or the one that writes for it, suffers a fault in the save after iteration 8.

    Returns:
        The error that ended the run, or None.

    Raises:
        OSError: The disk is full for a log, too, which only this process learns of; its launcher would end the others.
    """
    before = dict(os.environ)
    own = fault if ranks.rank == rank else None
    if own is not None and in_writer:
        os.environ.update(environment(fault, Path(fault.trace).parent))
    try:
        with active(None if in_writer else own):
            small_run.train(
                ranks, folder, strategy=strategy, total_iters=END, checkpoint_config__asynchronous=in_writer
            )
    except RuntimeError as error:  # what all processes learn of
        return f'{type(error).__name__}: {error}'
    finally:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(scope='module')
def runs(workers, tmp_path_factory):  # noqa: F811
    """Strategy -> folder of a run after iteration 6, of the whole run, and the file operations of each process."""
    made = {}

    def make(strategy):
        if strategy not in made:
            folder = tmp_path_factory.mktemp(strategy)
            operations = []
            for name, total in (('before', 6), ('whole', END)):
                (folder / name).mkdir()
                workers.run(small_run.train, folder / name, strategy=strategy, total_iters=total)
            for rank in range(2):
                run, trace = folder / f'traced{rank}', folder / f'{rank}.txt'
                shutil.copytree(folder / 'before', run)
                fault = Fault(MARK, -1, 'kill', str(trace))
                assert workers.run(train_with_fault, run, fault, rank, strategy, False) == [None, None]
                lines = trace.read_text().splitlines()
                next_save = [number for number, line in enumerate(lines) if 'mkdir' in line and '.iter_10.tmp-' in line]
                operations.append(lines[: next_save[0]] if next_save else [line for line in lines if MARK in line])
            made[strategy] = folder / 'before', folder / 'whole', operations
        return made[strategy]

    return make


@pytest.fixture
def suffer(workers, runs, tmp_path, monkeypatch):  # noqa: F811
    """Lets a save fail, looks at what is left, runs again and compares with the run that nothing disturbed."""
    monkeypatch.setattr(processes, 'GRACE_SECONDS', 30.0)  # the process that is left notices by itself

    def case(rank, number, how, strategy, in_writer=False):
        before, whole, _ = runs(strategy)
        case_folder = tmp_path / f'{strategy}_{rank}_{number}_{how}'
        folder, trace = case_folder / 'run', case_folder / 'trace.txt'
        shutil.copytree(before, folder)
        arguments = (folder, Fault(MARK, number, how, str(trace)), rank, strategy, in_writer)
        if how == 'kill' and not in_writer:
            with pytest.raises(ProcessFailedError) as died:
                workers.run(train_with_fault, *arguments, timeout=40)
            assert died.value.rank == rank
            errors = None
        else:
            try:
                errors = workers.run(train_with_fault, *arguments, timeout=40)
            except ProcessFailedError as died:
                if 'No space left on device' not in str(died):
                    raise
                errors = None
        lines = trace.read_text().splitlines()
        done, failed = lines[:number], lines[number]
        where = f'{how} at {failed} after {done}'
        is_published = any(line.startswith('rename') and line.endswith('/iter_8') for line in done)
        if in_writer and how == 'kill':
            assert errors[0] == errors[1], where
            assert errors[0].startswith(f'WriterEndedError: the process of rank {rank} that writes'), where
        elif how == 'full' and not is_published:
            assert errors is not None, where
            for error in errors:
                assert error.startswith('CheckpointError: saving '), where
                assert 'iter_8 failed: OSError: [Errno 28] No space left on device' in error, where
        assert {4, 6} <= set(small_run.steps(folder)) or (is_published and {6, 8} <= set(small_run.steps(folder))), (
            where
        )
        firsts = workers.run(small_run.train, folder, strategy=strategy, total_iters=END)
        if how == 'kill' or not is_published:
            assert firsts == ([8, 8] if is_published else [6, 6]), where
        small_run.assert_same_run(folder, whole)
        names = {path.name for path in small_run.checkpoints(folder).iterdir()}
        assert names == {path.name for path in small_run.checkpoints(whole).iterdir()}, where

    return case


@pytest.mark.parametrize(('rank', 'number', 'how'), [(0, 10, 'kill'), (1, 1, 'full')])
def test_at_some_operations(suffer, rank, number, how):
    suffer(rank, number, how, 'fsdp2')


def test_in_the_process_that_writes(suffer):
    suffer(1, 4, 'kill', 'fsdp2', in_writer=True)


@pytest.mark.slow
@pytest.mark.parametrize('in_writer', [False, True])
@pytest.mark.parametrize('strategy', ['ddp', 'fsdp2'])
@pytest.mark.parametrize('how', ['kill', 'full'])
@pytest.mark.parametrize('rank', [0, 1])
def test_at_every_operation(suffer, runs, rank, how, strategy, in_writer):
    for number in range(len(runs(strategy)[2][rank])):
        suffer(rank, number, how, strategy, in_writer)
